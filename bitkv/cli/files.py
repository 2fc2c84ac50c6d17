"""Result files, whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_writable(path: Path | None) -> None:
    """ValueError now rather than after minutes of work."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path} is a directory; pass a file name")
    if not path.parent.is_dir():
        raise ValueError(f"no directory {path.parent} to write {path.name} into; create it first")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"directory {path.parent} is not writable; pass another one")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, of its suffix, that takes its place if nothing is raised."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, rows: Any) -> None:
    """Write a JSON file."""
    with replaced(path) as temporary:
        temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
