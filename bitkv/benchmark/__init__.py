"""Decode attention and append against context length, beside PyTorch SDPA and memory bandwidth."""

from bitkv.benchmark.attention import run
from bitkv.benchmark.environment import Environment
from bitkv.benchmark.plot import check_plot, plot
from bitkv.benchmark.report import Report, Row, read_json, render, write_json

__all__ = [
    "Environment",
    "Report",
    "Row",
    "check_plot",
    "plot",
    "read_json",
    "render",
    "run",
    "write_json",
]
