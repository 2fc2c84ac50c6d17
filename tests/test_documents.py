"""The documents are true: snippets run, tables are those of the committed results."""

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
            known = help_of(command, *options)
            assert all(word in known for word in options if word.startswith("--"))


def help_of(*words: str) -> str:
    """The help of a command, or of the command below it that the next word names."""
    parser = build_parser()
    for word in words:
        groups = (action.choices for action in parser._actions if isinstance(action.choices, dict))
        if word not in (choices := next(groups, {})):
            break
        parser = choices[word]
    return parser.format_help()


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
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 160
