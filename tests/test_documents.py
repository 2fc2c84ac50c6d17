"""The documents are true: snippets run, tables are those of the committed results."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import publish
from bitkv.cli import build_parser

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_readme_python_runs_as_it_stands(tmp_path):
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks("python")), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d\.\d\d MB, \d\.\d\d bits per element\n", done.stdout)


def test_readme_commands_exist():
    pattern = r"^(?:make (?:run|test)|bitkv (?:generate|recipes|eval|bench)).*"
    lines = re.findall(pattern, README.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) >= 6
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for program, command, *options in (line.split() for line in lines):
        if program == "make":
            assert f"\n{command}:" in makefile
        else:
            known = subparser(command).format_help()
            assert all(word in known for word in options if word.startswith("--"))


def subparser(command: str) -> argparse.ArgumentParser:
    choices = next(action.choices for action in build_parser()._actions if action.choices)
    return choices[command]


@pytest.mark.parametrize("document", publish.DOCUMENTS, ids=lambda p: p.name)
def test_tables_are_made_from_the_committed_results(document):
    text = document.read_text(encoding="utf-8")
    assert publish.filled(text) == text, "run `python -m benchmarks.publish`"
    assert text.count("<!-- table") == text.count("<!-- end -->") > 0


def test_links_between_documents_lead_somewhere():
    for document in (*publish.DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "docs" / "design.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            assert target.startswith("http") or (document.parent / target).is_file(), target


def test_readme_stays_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150
