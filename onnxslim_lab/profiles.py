"""Target profiles: which quantization a runtime runs fast, and the choice for the machine at hand."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

from onnxslim_lab.errors import ParameterError, quote, suggest
from onnxslim_lab.targets.accelerators import OPENVINO, QNN, TENSORRT
from onnxslim_lab.targets.model import Fact, Operator, Profile
from onnxslim_lab.targets.onnxruntime import ARM, CUDA, WEB, X86, X86_VNNI

__all__ = ["PROFILES", "Fact", "Operator", "Profile", "cpu_flags", "find_profile", "profile_of_cpu"]

PROFILES: dict[str, Profile] = {
    profile.name: profile for profile in (X86_VNNI, X86, ARM, WEB, CUDA, TENSORRT, QNN, OPENVINO)
}
"""Every profile by name; "auto" stands for the one of this machine's CPU."""

_CPUINFO = Path("/proc/cpuinfo")
_VNNI = frozenset({"avx512_vnni", "avx_vnni", "avx512vnni", "avxvnni"})
_X86 = frozenset({"x86_64", "amd64", "x86", "i386", "i686"})
_ARM = frozenset({"aarch64", "arm64"})


def find_profile(name: str) -> Profile:
    """Return the profile called `name`; "auto" is that of this machine's CPU.

    Raises:
        ParameterError: There is none.

    >>> find_profile("tensorrt").symmetric_activations
    True
    >>> find_profile("auto").name in PROFILES
    True
    """
    if name == "auto":
        return profile_of_cpu(platform.machine(), cpu_flags())
    if name not in PROFILES:
        raise ParameterError(f"no target {quote(name)}{suggest(name, ['auto', *PROFILES])}")
    return PROFILES[name]


def profile_of_cpu(machine: str, flags: frozenset[str] | None) -> Profile:
    """Return onnxruntime's profile for a CPU, with the reason in its `notice`.

    Args:
        machine: The architecture, as `platform.machine()` names it.
        flags: The CPU's features; None when they cannot be read: then the profile that is right on every
            x86 CPU is taken.

    >>> profile_of_cpu("x86_64", frozenset({"avx2", "avx_vnni"})).name
    'onnxruntime-x86-vnni'
    >>> profile_of_cpu("x86_64", None).reduce_range
    True
    """
    kind = machine.lower()
    if kind in _ARM:
        return _chosen(ARM, f"this CPU is {machine}")
    if kind not in _X86:
        return _chosen(X86, f"no profile for the architecture {quote(machine)}: the safe one is taken")
    if flags is None:
        return _chosen(X86, "this CPU's features could not be read: the profile without VNNI is taken")
    found = sorted(flags & _VNNI)
    if found:
        return _chosen(X86_VNNI, f"this CPU has {found[0]}")
    return _chosen(X86, "this CPU has no VNNI: int8 products would saturate, weights get 7 bits")


def _chosen(profile: Profile, why: str) -> Profile:
    return profile.model_copy(update={"notice": f"target {profile.name}: {why}"})


def cpu_flags() -> frozenset[str] | None:
    """Return the features of this machine's CPU in lower case, None when they cannot be read.

    Linux tells them in /proc/cpuinfo, macOS by sysctl; Windows tells nobody without a compiled helper.
    """
    system = platform.system()
    if system == "Linux":
        try:
            return flags_of_cpuinfo(_CPUINFO.read_text(errors="replace"))
        except OSError:
            return None
    if system == "Darwin":
        names = ["machdep.cpu.features", "machdep.cpu.leaf7_features"]
        try:
            told = subprocess.run(
                ["/usr/sbin/sysctl", "-n", *names], capture_output=True, text=True, timeout=5, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return frozenset(told.stdout.lower().split()) or None
    return None


def flags_of_cpuinfo(text: str) -> frozenset[str] | None:
    r"""Return the features that every processor of a /proc/cpuinfo has, None when it names none.

    >>> sorted(flags_of_cpuinfo("flags : avx2 avx_vnni\n\nflags : avx2\n"))
    ['avx2']
    """
    listed = [
        frozenset(value.lower().split())
        for key, _, value in (line.partition(":") for line in text.splitlines())
        if key.strip() in ("flags", "Features")
    ]
    return frozenset.intersection(*listed) if listed else None
