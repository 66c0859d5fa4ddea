"""Target profiles are consistent data, and the machine's own is chosen by what its CPU says."""

import platform
import subprocess

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from onnxslim_lab import profiles
from onnxslim_lab.cli import app
from onnxslim_lab.errors import ParameterError
from onnxslim_lab.profiles import PROFILES, cpu_flags, find_profile, profile_of_cpu
from onnxslim_lab.quantization.types import QUANT_TYPES
from onnxslim_lab.report import Report


@pytest.mark.parametrize("profile", PROFILES.values(), ids=list(PROFILES))
def test_a_profile_agrees_with_itself(profile):
    assert PROFILES[profile.name] is profile
    assert profile.format in profile.formats
    lowest, highest = profile.opsets
    assert lowest < highest
    assert "" in profile.domains
    assert profile.facts, "a profile without a source is an opinion"
    assert all(fact.text and fact.source for fact in profile.facts)
    listed = {*profile.activation_types, *profile.weight_types, *profile.weight_only_types}
    assert listed <= set(QUANT_TYPES)
    if profile.operators:
        assert profile.activations in profile.activation_types
        assert profile.weights in profile.weight_types
    assert set(profile.slow_activations) < set(profile.activation_types) or not profile.slow_activations
    assert profile.activations not in profile.slow_activations
    assert profile.weights not in profile.slow_weights
    for name, operator in profile.operators.items():
        assert set(operator.types) <= set(profile.activation_types) | {"uint16", "int16"}, name
        assert name not in profile.refuses
        assert profile.runs is None or name in profile.runs, name


def test_only_profiles_that_saturate_reduce_the_range():
    assert [p.name for p in PROFILES.values() if p.saturates] == ["onnxruntime-x86"]
    assert all(p.saturates == p.reduce_range for p in PROFILES.values())


def test_a_typo_gets_a_suggestion():
    with pytest.raises(ParameterError, match="no target 'tensort'; did you mean 'tensorrt'?"):
        find_profile("tensort")


@pytest.mark.parametrize(
    ("machine", "flags", "name", "why"),
    [
        ("x86_64", ["avx2", "avx512_vnni"], "onnxruntime-x86-vnni", "avx512_vnni"),
        ("AMD64", ["avx_vnni"], "onnxruntime-x86-vnni", "avx_vnni"),
        ("x86_64", ["avx2", "avx512f"], "onnxruntime-x86", "saturate"),
        ("x86_64", None, "onnxruntime-x86", "could not be read"),
        ("aarch64", None, "onnxruntime-arm", "aarch64"),
        ("arm64", ["asimddp"], "onnxruntime-arm", "arm64"),
        ("riscv64", None, "onnxruntime-x86", "no profile"),
    ],
)
def test_the_cpu_decides_and_the_reason_is_told(machine, flags, name, why):
    profile = profile_of_cpu(machine, None if flags is None else frozenset(flags))
    assert profile.name == name
    assert why in profile.notice
    assert profile.model_copy(update={"notice": ""}) == PROFILES[name]


def test_flags_are_those_of_linux(monkeypatch, tmp_path):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(profiles, "_CPUINFO", path)
    assert cpu_flags() is None  # no such file
    path.write_text("processor : 0\nflags\t\t: fpu AVX2 avx512_vnni\n\nprocessor : 1\nflags : fpu avx2\n")
    assert cpu_flags() == {"fpu", "avx2"}  # what every processor has
    path.write_text("processor : 0\nFeatures : fp asimd\n")
    assert cpu_flags() == {"fp", "asimd"}
    path.write_text("nothing to see")
    assert cpu_flags() is None


def test_flags_are_those_of_macos(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    told = subprocess.CompletedProcess([], 0, stdout="FPU AVX2\nAVX512VNNI\n", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: told)
    assert cpu_flags() == {"fpu", "avx2", "avx512vnni"}

    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    assert cpu_flags() is None


def test_windows_is_unknown_and_safe(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    assert cpu_flags() is None
    profile = find_profile("auto")
    assert profile.name == "onnxruntime-x86"
    assert "could not be read" in profile.notice


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"avx2", "avx512_vnni"}, "this CPU has avx512_vnni; weights int8, activations uint8"),
        (
            {"avx2"},
            "this CPU has no VNNI: int8 products would saturate, weights get 7 bits; weights int8 of 7 bits",
        ),
    ],
)
def test_reports_say_why_the_types_were_chosen(flags, told, monkeypatch, tmp_path):
    monkeypatch.setattr("onnxslim_lab.profiles.cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    text = (
        '<ir_version: 8, opset_import: ["" : 17]> g (float[4,64] x) => (float[4,64] y) { y = MatMul(x, w) }'
    )
    model = onnx.parser.parse_model(text)
    values = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(values, "w"))
    onnx.save(model, tmp_path / "m.onnx")
    command = ["optimize", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "q.onnx"), "-p", "quantize"]
    report = tmp_path / "report.json"
    result = CliRunner().invoke(app, [*command, "--report", str(report)])
    assert result.exit_code == 0, result.output
    assert told in " ".join(result.output.split())
    (notice,) = Report.model_validate_json(report.read_text()).steps[-1].notices
    assert told in notice
