"""Files, whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_folder(path: Path) -> None:
    """Raises ValueError if there is no folder to write `path` into."""
    if not path.absolute().parent.is_dir():
        raise ValueError(f"no folder {path.parent} for {path.name}; create it first")


def check_writable(path: Path | None) -> None:
    """ValueError now rather than after minutes of work."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path} is a directory; pass a file name")
    check_folder(path)
    if not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(f"folder {path.parent} is not writable; pass another one")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well.

    Raises:
        ValueError: there is no folder to write into.
    """
    check_folder(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, rows: Any) -> None:
    """Write a JSON file."""
    with replacing(path) as temporary:
        text = json.dumps(rows, indent=1, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
