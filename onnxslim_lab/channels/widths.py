"""How many channels a runtime's kernels take at a time: a width in between costs as much as the next multiple."""

from __future__ import annotations

from onnxslim_lab.profiles import cpu_flags, find_profile

COMMON = 8
_OTHERS = {"qnn": 32}  # channels of a vector of its tensor unit


def width_multiple(target: str) -> int:
    """Return the number that widths should be multiples of on a target.

    Onnxruntime's convolutions on x86 hold channels in blocks of 16 with AVX-512 and of 8 without (its layout
    "NCHWc"; the last block is padded); tensor cores take float16 by eights.

    >>> width_multiple("tensorrt")
    8
    """
    profile = find_profile(target)
    if target == "auto" and "avx512f" in (cpu_flags() or ()):
        return 16
    return _OTHERS.get(profile.name, COMMON)
