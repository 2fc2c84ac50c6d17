"""Measuring what a recipe costs: loss, agreement with the stock cache, recall, errors of attention."""

from bitkv.evaluation.report import (
    PROTOCOLS,
    Agreement,
    Fidelity,
    Perplexity,
    Recall,
    Row,
    tables,
    write_json,
)
from bitkv.evaluation.suite import TASKS, run

__all__ = [
    "PROTOCOLS",
    "TASKS",
    "Agreement",
    "Fidelity",
    "Perplexity",
    "Recall",
    "Row",
    "run",
    "tables",
    "write_json",
]
