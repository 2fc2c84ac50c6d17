"""Rows in JSON files: a list of flat records, each with the fields of its run."""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from bitkv import files
from bitkv.benchmark.decode_report import DecodeRow
from bitkv.benchmark.environment import Environment
from bitkv.benchmark.report import Row

AnyRow = TypeVar("AnyRow", Row, DecodeRow)


def write_json(rows: Sequence[AnyRow], path: Path | str) -> None:
    """Write a JSON list of rows, whole or not at all. Each row carries its run's fields.

    Raises:
        ValueError: the folder does not exist.
    """
    flat = [asdict(row) for row in rows]
    files.write_json(Path(path), [record | record.pop("environment") for record in flat])


def read_json(path: Path | str, kind: type[AnyRow]) -> list[AnyRow]:
    """The rows of a kind in a file that `write_json` wrote.

    Raises:
        ValueError: the file holds something else.
    """
    shared = [field.name for field in fields(Environment)]
    try:
        records: list[dict[str, Any]] = json.loads(Path(path).read_text(encoding="utf-8"))
        environments = [
            Environment(**{name: r.pop(name) for name in shared if name in r}) for r in records
        ]
        return [kind(**r, environment=e) for r, e in zip(records, environments, strict=True)]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(
            f"{path} holds no benchmark rows; pass a file of `bitkv bench --json`"
        ) from None
