"""The bundled texts: what recipes learn from is never what they are measured on."""

import pytest

from bitkv.generation.checkpoint import ASSETS
from training.data import SHARED_LINE_CHARS, load_corpus
from training.package import calibration_text


def long_lines(name: str) -> set[str]:
    lines = (line.strip() for line in (ASSETS / name).read_text(encoding="utf-8").splitlines())
    return {line for line in lines if len(line) >= SHARED_LINE_CHARS}


@pytest.mark.parametrize("name", ["calibration.txt", "prose.txt"])
def test_no_long_line_of_it_is_held_out(name):
    lines = long_lines(name)
    assert len(lines) > 300
    assert not lines & (long_lines("heldout.txt") | long_lines("document.txt"))


def test_calibration_text_is_drawn_from_every_kind_the_same_each_time():
    train, _ = load_corpus()
    text = calibration_text(train)
    assert text == calibration_text(train)
    assert text != calibration_text(train, seed=1)
    assert 270_000 < len(text) < 420_000
    for kind in ("topic", "docstrings", "source"):
        known = {line for d in train if d.kind == kind for line in d.text.splitlines()}
        assert sum(len(line) for line in text.splitlines() if line in known) > 80_000
