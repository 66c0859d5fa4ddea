"""TensorRT, Qualcomm's QNN and OpenVINO: what their documents say; none was run here."""

from __future__ import annotations

from onnxslim_lab.targets.model import Fact, Operator, Profile

_TENSORRT = "NVIDIA TensorRT documentation, 'Working with Quantized Types'"
_TENSORRT_OPERATORS = "onnx-tensorrt, 'Supported ONNX Operators'"
_QNN = "onnxruntime documentation, 'QNN Execution Provider'"
_OPENVINO = "OpenVINO documentation, 'OpenVINO Low Precision Transformations'"


def _names(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


def _all(form: str, names: str, **more: object) -> dict[str, Operator]:
    """Return the same rule for several operators."""
    return {name: Operator.model_validate({"form": form, **more}) for name in names.split()}


TENSORRT = Profile(
    name="tensorrt",
    description="NVIDIA TensorRT 10 and 11 (explicit quantization)",
    activations="int8",
    activation_types=("int8", "float8e4m3fn"),
    weight_types=("int8", "float8e4m3fn"),
    weight_only_types=("int4",),
    symmetric_activations=True,
    symmetric_weights=True,
    quantized_bias=False,
    absorbs=("Relu",),
    blocks=(64, 128),
    operators={
        **_all("layer", "Conv ConvTranspose MatMul Gemm", float_output=True),
        **_all("binary", "Add", note="quantize both branches of a residual sum"),
        **_all("unary", "AveragePool GlobalAveragePool"),
        **_all("variadic", "Concat"),
        **_all("same", "MaxPool Reshape Transpose Squeeze Unsqueeze Flatten Slice Gather Resize"),
    },
    opsets=(9, 25),
    domains=("",),
    refuses=_names(
        "QLinearConv QLinearMatMul ConvInteger MatMulInteger DynamicQuantizeLinear BitShift Compress "
        "ConcatFromSequence Det MaxRoiPool MaxUnpool Multinomial RandomNormal RandomNormalLike "
        "SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength SplitToSequence "
        "StringNormalizer TfIdfVectorizer Unique"
    ),
    facts=(
        Fact(text="quantization is symmetric: every zero point is 0, types are signed", source=_TENSORRT),
        Fact(text="int4 is for weights only, in blocks; activations stay floating point", source=_TENSORRT),
        Fact(text="QuantizeLinear takes float inputs; a bias stays floating point", source=_TENSORRT),
        Fact(text="QLinear and Integer operators are not parsed", source=_TENSORRT_OPERATORS),
        Fact(
            text="the ONNX parser of TensorRT 11 reads opsets 9 to 25; check yours",
            source="NVIDIA TensorRT documentation, 'ONNX Opset Guide'",
        ),
    ),
)

_QNN_RUNS = _names(
    "Abs Add And ArgMax ArgMin Asin Atan AveragePool BatchNormalization Cast Clip Concat Constant Conv ConvTranspose "
    "Cos DepthToSpace DequantizeLinear Div Elu Equal Exp Expand Flatten Floor Gather Gelu Gemm GlobalAveragePool "
    "Greater GreaterOrEqual GridSample HardSwish Identity InstanceNormalization LRN LayerNormalization LeakyRelu Less "
    "LessOrEqual Log LogSoftmax LpNormalization MatMul Max MaxPool Min Mul Neg Not Or PRelu Pad Pow "
    "QuantizeLinear ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Relu Reshape Resize Round Sigmoid Sign "
    "Sin Slice Softmax SpaceToDepth Split Sqrt Squeeze Sub Tanh Tile TopK Transpose Unsqueeze Where"
)

QNN = Profile(
    name="qnn",
    description="Qualcomm NPU (HTP) by onnxruntime's QNN execution provider",
    activations="uint8",
    activation_types=("uint8", "uint16"),
    weight_types=("uint8", "int8", "int4"),
    operators={
        **_all("layer", "Conv ConvTranspose MatMul Gemm"),
        **_all("binary", "Add Sub Mul Div Max Min Pow PRelu"),
        **_all("select", "Where"),
        **_all("variadic", "Concat"),
        **_all(
            "unary",
            "AveragePool GlobalAveragePool MaxPool Relu Clip Sigmoid Tanh Softmax LogSoftmax Gelu HardSwish Elu "
            "LeakyRelu LayerNormalization InstanceNormalization BatchNormalization LpNormalization Exp Log Sqrt Abs "
            "Neg ReduceMean ReduceSum ReduceMax ReduceMin Resize Pad GridSample",
        ),
        **_all(
            "same",
            "Reshape Transpose Flatten Squeeze Unsqueeze Slice Split Gather DepthToSpace SpaceToDepth Tile Expand",
        ),
    },
    opsets=(7, 21),
    domains=("", "com.microsoft"),
    absorbs=("Relu", "Clip"),
    runs=_QNN_RUNS,
    control_flow=False,
    dynamic_shapes=False,
    facts=(
        Fact(text="shapes must be fixed; If and Loop do not run", source=_QNN),
        Fact(text="the HTP backend runs quantized models only: every operator wants Q and DQ", source=_QNN),
        Fact(text="operators typically take uint8 and uint16; MatMul one operand of 8 bits", source=_QNN),
        Fact(
            text="16-bit Q and DQ below opset 21 are those of com.microsoft",
            source=_QNN,
        ),
    ),
)

OPENVINO = Profile(
    name="openvino",
    description="OpenVINO on Intel CPUs and GPUs",
    activations="uint8",
    activation_types=("uint8", "int8"),
    weight_types=("int8", "uint8"),
    weight_only_types=("int4", "uint4", "int8", "uint8"),
    symmetric_weights=True,
    formats=("qdq", "qoperator"),
    absorbs=("Relu", "Clip", "PRelu", "Sigmoid"),
    operators={
        **_all("layer", "Conv ConvTranspose MatMul Gemm", float_output=True),
        **_all("binary", "Add Mul Sub"),
        **_all("variadic", "Concat"),
        **_all("unary", "AveragePool GlobalAveragePool ReduceMean ReduceSum Clip PRelu Relu"),
        **_all(
            "same",
            "MaxPool ReduceMax ReduceMin Reshape Transpose Squeeze Unsqueeze Split Slice Gather DepthToSpace "
            "SpaceToDepth Pad Resize Flatten",
        ),
    },
    opsets=(7, 25),
    domains=("", "com.microsoft", "org.openvinotoolkit"),
    refuses=frozenset({"QGemm", "QAttention"}),
    facts=(
        Fact(text="Q and DQ pairs are read as FakeQuantize, then lowered to int8 kernels", source=_OPENVINO),
        Fact(text="activations unsigned or signed 8 bits, weights signed and symmetric", source=_OPENVINO),
        Fact(
            text="operators of com.microsoft are known in part; QGemm is not",
            source="OpenVINO, 'ONNX Operations Supported by OpenVINO ONNX Frontend'",
        ),
    ),
)
