"""Decode attention, packing and a model's decode steps, beside their rivals and memory bandwidth."""

from bitkv.benchmark.attention import run as run_attention
from bitkv.benchmark.decode import run as run_decode
from bitkv.benchmark.decode_report import DecodeReport, DecodeRow, render_decode
from bitkv.benchmark.drawing import check_plot
from bitkv.benchmark.environment import Environment
from bitkv.benchmark.packing import run as run_packing
from bitkv.benchmark.plot import plot, plot_decode
from bitkv.benchmark.report import Report, Row, render
from bitkv.benchmark.rows import read_json, write_json

__all__ = [
    "DecodeReport",
    "DecodeRow",
    "Environment",
    "Report",
    "Row",
    "check_plot",
    "plot",
    "plot_decode",
    "read_json",
    "render",
    "render_decode",
    "run_attention",
    "run_decode",
    "run_packing",
    "write_json",
]
