"""onnxruntime's CPU provider, on machines and in browsers, and its CUDA provider.

What fuses was read in onnxruntime's source (optimizer/qdq_transformer/selectors_actions/qdq_selectors.cc
and qdq_selector_action_transformer.cc) and checked by saving the optimized form of small models with
onnxruntime 1.31 on an x86 CPU with VNNI; tests/test_target_check.py repeats the experiment.
"""

from __future__ import annotations

from onnxslim_lab.targets.model import Fact, Operator, Profile

_MANUAL = "onnxruntime documentation, 'Quantize ONNX Models'"
_SOURCE = "onnxruntime source, qdq_selectors.cc"
_TRIED = "experiment, onnxruntime 1.31 on x86 with AVX512-VNNI"
_BYTES = ("uint8", "int8")
_WIDE = ("uint8", "int8", "uint16", "int16")

_SOFTMAX = (
    "QLinearSoftmax computes from a table: attention weights near 0 are lost (a ViT fell to cosine 0.10)"
)

OPERATORS: dict[str, Operator] = {
    "Conv": Operator(
        form="layer", becomes="QLinearConv", float_weight=True, note="its output must be quantized"
    ),
    "MatMul": Operator(form="layer", becomes="QLinearMatMul or MatMulIntegerToFloat", float_output=True),
    "Gemm": Operator(
        form="layer",
        becomes="QGemm",
        float_output=True,
        float_weight=True,
        note="with a bias, alpha and beta must be 1",
    ),
    "Add": Operator(form="binary", becomes="QLinearAdd"),
    "Mul": Operator(form="binary", becomes="QLinearMul"),
    "Where": Operator(form="select", becomes="QLinearWhere"),
    "Concat": Operator(form="variadic", becomes="QLinearConcat"),
    "AveragePool": Operator(form="unary", becomes="QLinearAveragePool"),
    "GlobalAveragePool": Operator(form="unary", becomes="QLinearGlobalAveragePool"),
    "LeakyRelu": Operator(form="unary", becomes="QLinearLeakyRelu"),
    "Sigmoid": Operator(form="unary", becomes="QLinearSigmoid"),
    "Softmax": Operator(form="unary", becomes="QLinearSoftmax", avoid=_SOFTMAX),
    "ArgMax": Operator(form="reads"),
    "MaxPool": Operator(form="same", types=_BYTES, since=12),
    "ReduceMax": Operator(form="same", types=_BYTES, since=12, breaks_below=12),
    "ReduceMin": Operator(form="same", types=_BYTES, since=12, breaks_below=12),
    "Resize": Operator(form="same", types=_BYTES, note="mode nearest only"),
    "DepthToSpace": Operator(form="same", types=_BYTES, since=11, breaks_below=11),
    "Split": Operator(form="same", types=_WIDE, since=13),
    "Expand": Operator(form="same", types=_WIDE),
    "Flatten": Operator(form="same", types=_WIDE),
    "Gather": Operator(form="same", types=_WIDE),
    "GatherElements": Operator(form="same", types=_WIDE),
    "Reshape": Operator(form="same", types=_WIDE),
    "Slice": Operator(form="same", types=_WIDE),
    "Squeeze": Operator(form="same", types=_WIDE),
    "Tile": Operator(form="same", types=_WIDE),
    "Transpose": Operator(form="same", types=_WIDE),
    "Unsqueeze": Operator(form="same", types=_WIDE),
}

_FACTS = (
    Fact(text="a Conv whose output is not quantized runs in float between DQ nodes", source=_SOURCE),
    Fact(text="every output of a group must have one QuantizeLinear and no other reader", source=_SOURCE),
    Fact(
        text="Relu and Clip after a layer vanish when the output's quantized range ends where theirs does",
        source=_SOURCE,
    ),
    Fact(
        text="DQ with blocks along the input axis of a 2-D weight becomes MatMulNBits: 2, 4 and 8 bits, "
        "blocks of 16 or more that are powers of two, MatMul or untransposed Gemm",
        source=_SOURCE,
    ),
    Fact(text="per-channel DQ and Q around operators that move values do not fuse", source=_TRIED),
    Fact(
        text="fused without a look at the axis: a Conv weight with scales along another axis than 0 gives wrong "
        "results, a MatMul weight with scales along its input axis or in blocks stops at run time",
        source=_TRIED,
    ),
    Fact(
        text="QGemm takes a bias to have the scale of input times weight: another gives wrong results; a Conv "
        "with such a bias runs in float",
        source=_TRIED,
    ),
    Fact(
        text="on x86 int8 activations are rewritten to uint8 where a Q has one reader; where residual "
        "connections have more, int8 and uint8 meet and the groups run in float (signed activations took 0.77 to "
        "1.8 times float over the development models, unsigned ones 0.30 to 0.68)",
        source="onnxruntime source, qdq_s8_to_u8.cc, and measurement on x86 with VNNI",
    ),
    Fact(
        text="on x86 and from opset 21, int8 activations before a node that only moves values, and a Q of "
        "int8 with output_dtype, keep the model from loading",
        source=_TRIED,
    ),
    Fact(text="S8S8 in QLinear operators is slow on x86-64", source=_MANUAL),
    Fact(text="Gather from a dequantized table dequantizes all of it on every run", source=_TRIED),
)

_COMMON = Profile(
    name="onnxruntime",
    description="onnxruntime, CPU execution provider",
    activation_types=_BYTES,
    weight_types=_BYTES,
    weight_only_types=("int4", "uint4", "int8", "uint8", "int2", "uint2"),
    formats=("qdq", "qoperator", "microsoft"),
    rewrites_signed=True,
    blocks=(16, 32, 64, 128, 256),
    dynamic=True,
    operators=OPERATORS,
    opsets=(7, 26),
    domains=("", "ai.onnx.ml", "com.microsoft"),
    facts=_FACTS,
)

X86_VNNI = _COMMON.model_copy(
    update={
        "name": "onnxruntime-x86-vnni",
        "description": "onnxruntime on an x86-64 CPU with AVX512-VNNI or AVX-VNNI",
        "slow_activations": ("int8",),
        "slow_weights": ("uint8",),
        "facts": (
            *_FACTS,
            Fact(text="no sums of int8 products saturate with VNNI", source=_MANUAL),
            Fact(text="uint8 weights (U8U8) took 3.7 to 5 times as long as int8 ones (U8S8)", source=_TRIED),
        ),
    }
)

X86 = _COMMON.model_copy(
    update={
        "name": "onnxruntime-x86",
        "description": "onnxruntime on an x86-64 CPU without VNNI (AVX2, AVX512)",
        "reduce_range": True,
        "saturates": True,
        "slow_activations": ("int8",),
        "slow_weights": ("uint8",),
        "facts": (
            *_FACTS,
            Fact(
                text="uint8 x int8 products are summed in pairs into int16 (VPMADDUBSW) and saturate; 7-bit "
                "weights (reduce_range) or uint8 weights (U8U8, slower) do not",
                source=_MANUAL,
            ),
        ),
    }
)

ARM = _COMMON.model_copy(
    update={
        "name": "onnxruntime-arm",
        "description": "onnxruntime on a 64-bit ARM CPU (Apple silicon, Graviton, phones)",
        "activations": "int8",
        "rewrites_signed": False,
        "facts": (
            *_FACTS,
            Fact(text="no sums of int8 products saturate on ARM", source=_MANUAL),
            Fact(
                text="signed activations stay signed (the rewriting to unsigned is for x86 only); their "
                "symmetric kernels need weights with zero point 0",
                source="onnxruntime source, mlas qgemm.h and QDQIsInt8Allowed",
            ),
        ),
    }
)

WEB = _COMMON.model_copy(
    update={
        "name": "onnxruntime-web",
        "description": "onnxruntime-web in a browser: WebAssembly, or WebGPU for weight-only models",
        "int4_format": "MatMulNBits",
        "domains": ("", "com.microsoft"),
        "refuses": frozenset({"ConvInteger"}),
        "facts": (
            *_FACTS,
            Fact(
                text="WebAssembly runs the CPU provider's operators; WebGPU runs MatMulNBits and float, and "
                "hands QLinear operators back to WebAssembly",
                source="onnxruntime-web documentation, 'Operators Support Table' of WebGPU",
            ),
            Fact(
                text="ConvInteger has no kernel for int8 weights in WebAssembly",
                source="transformers.js, quantization script, note on onnxruntime-web 1.20",
            ),
        ),
    }
)

CUDA = Profile(
    name="cuda",
    description="onnxruntime, CUDA execution provider",
    activations="int8",
    activation_types=(),
    weight_types=(),
    weight_only_types=("int4", "uint4", "int8", "uint8"),
    symmetric_weights=False,
    formats=("qdq", "microsoft"),
    int4_format="MatMulNBits",
    blocks=(16, 32, 64, 128),
    operators={},
    opsets=(7, 26),
    domains=("", "ai.onnx.ml", "com.microsoft"),
    refuses=frozenset(
        {"QLinearConv", "QLinearMatMul", "ConvInteger", "QGemm", "QLinearAdd", "QLinearMul", "QLinearConcat"}
    ),
    facts=(
        Fact(
            text="no integer kernels of QLinearConv and its kind: such nodes run on the CPU, with copies",
            source="onnxruntime issue 24807, '[Performance] Slow inference on CUDA V100 int8'",
        ),
        Fact(
            text="DQ of blockwise weights before MatMul becomes MatMulNBits",
            source="onnxruntime source, qdq_selector_action_transformer.cc",
        ),
        Fact(text="int8 on NVIDIA GPUs is the business of the TensorRT provider", source=_MANUAL),
    ),
)
