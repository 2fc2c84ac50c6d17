"""Measuring what a recipe costs: loss, agreement with the stock cache, recall, errors of attention."""

from bitkv.evaluation.report import (
    PROTOCOLS,
    Agreement,
    Copy,
    Divergence,
    Fidelity,
    Perplexity,
    Recall,
    Row,
    tables,
    write_json,
)
from bitkv.evaluation.stress import stressed
from bitkv.evaluation.suite import TASKS, Options, run

__all__ = [
    "PROTOCOLS",
    "TASKS",
    "Agreement",
    "Copy",
    "Divergence",
    "Fidelity",
    "Options",
    "Perplexity",
    "Recall",
    "Row",
    "run",
    "stressed",
    "tables",
    "write_json",
]
