"""The documentation says what the code does: doctests, generated tables, links."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import onnxslim_lab
import onnxslim_lab.kernels
import onnxslim_lab.passes
from onnxslim_lab import describe

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def modules():
    for package in (onnxslim_lab, onnxslim_lab.passes, onnxslim_lab.kernels):
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if not found.ispkg and not found.name.endswith("__main__"):
                yield found.name


@pytest.mark.parametrize("name", sorted(modules()))
def test_doctests(name):
    failures, _ = doctest.testmod(importlib.import_module(name))
    assert failures == 0


def test_readme_lists_every_pass_as_defined():
    table = describe.markdown(list(onnxslim_lab.passes.PASSES))
    assert table in README, f"README's table of passes is out of date; it should be:\n{table}"


def test_readme_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (REPOSITORY / target).exists(), target


def test_readme_names_every_command():
    from onnxslim_lab.cli import app

    for command in app.registered_commands:
        assert f"`{command.callback.__name__.replace('_', '-')}" in README


def test_nothing_large_is_committed():
    for path in REPOSITORY.rglob("*"):
        if ".git" not in path.parts and ".venv" not in path.parts and path.is_file():
            assert path.stat().st_size < 2_000_000 or "cache" in str(path), path
