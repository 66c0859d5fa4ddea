"""Graph passes, one per file; imported as onnxslim_lab.passes."""

if __name__ != "onnxslim_lab.passes":
    raise ImportError("this folder is not a package of its own: import onnxslim_lab.passes")

from onnxslim_lab.base import Pass
from onnxslim_lab.passes.cancel_transposes import CancelTransposes
from onnxslim_lab.passes.convert_precision import ConvertPrecision
from onnxslim_lab.passes.correct_bias import CorrectBias
from onnxslim_lab.passes.deduplicate import Deduplicate
from onnxslim_lab.passes.eliminate_dead import EliminateDead
from onnxslim_lab.passes.eliminate_identity import EliminateIdentity
from onnxslim_lab.passes.encode import Encode
from onnxslim_lab.passes.equalize import Equalize
from onnxslim_lab.passes.factorize import Factorize
from onnxslim_lab.passes.fold_constants import FoldConstants
from onnxslim_lab.passes.fuse_activation import FuseActivation
from onnxslim_lab.passes.fuse_batchnorm import FuseBatchnorm
from onnxslim_lab.passes.fuse_layernorm import FuseLayernorm
from onnxslim_lab.passes.fuse_linear import FuseLinear
from onnxslim_lab.passes.inline_constant_if import InlineConstantIf
from onnxslim_lab.passes.inline_functions import InlineFunctions
from onnxslim_lab.passes.prune import Prune
from onnxslim_lab.passes.prune_channels import PruneChannels
from onnxslim_lab.passes.quantize import Quantize
from onnxslim_lab.passes.share import Share
from onnxslim_lab.passes.simplify import Simplify
from onnxslim_lab.passes.simplify_shapes import SimplifyShapes
from onnxslim_lab.passes.strip import Strip

PASSES: tuple[type[Pass], ...] = (
    Simplify,
    InlineFunctions,
    FoldConstants,
    EliminateIdentity,
    SimplifyShapes,
    InlineConstantIf,
    CancelTransposes,
    FuseLayernorm,
    FuseActivation,
    FuseBatchnorm,
    FuseLinear,
    Deduplicate,
    EliminateDead,
    Prune,
    PruneChannels,
    Factorize,
    Share,
    ConvertPrecision,
    Equalize,
    Quantize,
    CorrectBias,
    Encode,
    Strip,
)
