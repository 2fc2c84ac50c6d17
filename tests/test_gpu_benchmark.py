"""The script for GPUs goes all its ways in the interpreter; only the clock needs a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels for GPUs need Triton")
ROOT = Path(__file__).parents[1]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_dry_run_checks_every_stage_and_times_nothing(tmp_path):
    done = run("--dry-run", "--json", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gpu.json").read_text())
    rows = record["rows"]
    assert {row["what"] for row in rows} == {"check", "copy", "attention", "generate", "step", "pack"}
    assert all(row["us"] is None for row in rows)
    assert all(row["error"] < 0.01 for row in rows if row["error"] is not None)
    assert record["environment"]["device"] == "cpu, interpreted"
    assert "4 of 4 tokens as the reference's" in done.stdout
    assert "1 graph compiled, 0 not captured: 4 of 4 tokens as a growing cache's" in done.stdout
    assert "replayed steps equal eager ones" in done.stdout


def test_a_spent_budget_ends_the_run_with_what_there_is(tmp_path):
    done = run("--dry-run", "--budget", "0", "--json", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"] == []
