"""Write a text file so that its readers see the old one or the new one, nothing between."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from onnxslim_lab.errors import SaveError, quote


def write_atomic(path: Path, text: str) -> None:
    """Write beside the target, flush to disk, then rename over it.

    Raises:
        SaveError: It cannot be written; what was there before is intact.
    """
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".part", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(
                descriptor, "w", encoding="utf-8", errors="backslashreplace", newline="\n"
            ) as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise SaveError(f"cannot write {quote(str(path))}: {error.strerror}") from error
