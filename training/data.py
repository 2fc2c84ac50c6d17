"""Corpus, held-out split and tokenizer.

The corpus is what every Python installation carries: the documentation topics of ``pydoc_data``
and the source of the standard library.  One document in ``HELD_OUT_EVERY`` is held out by a
checksum of its name, and a line of held-out text that also occurs in a training document is
removed from the training document.
"""

from __future__ import annotations

import ast
import random
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from bitkv.evaluation import tasks

BOS, EOS = "<|bos|>", "<|eos|>"
HELD_OUT_EVERY, HELD_OUT_REST = 10, 4
#: Lines shorter than this (``return None``) are common to all programs and stay in both splits.
SHARED_LINE_CHARS = 40
SKIPPED_DIRECTORIES = {
    "test", "tests", "site-packages", "idlelib", "lib2to3", "encodings", "ensurepip",
    "pydoc_data", "__pycache__", "turtledemo",
}  # fmt: skip
LONGEST_SOURCE = 400_000


@dataclass(frozen=True)
class Document:
    """One named text; ``kind`` is ``topic``, ``docstrings`` or ``source``."""

    name: str
    kind: str
    text: str


def _topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(name, "topic", text.strip() + "\n")


def _docstrings(source: str) -> str:
    """All multi-line docstrings of a module, cleaned of their indentation."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            text = ast.get_docstring(node)
            if text and text.count("\n") >= 2:
                found.append(text.strip())
    return "\n\n".join(found)


def _sources() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if SKIPPED_DIRECTORIES & set(path.relative_to(root).parts[:-1]):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if not text.strip() or len(text) > LONGEST_SOURCE or name.startswith("_sysconfigdata"):
            continue
        yield Document(name, "source", text.expandtabs().strip() + "\n")
        prose = _docstrings(text)
        if prose:
            yield Document(name, "docstrings", prose + "\n")


def is_held_out(name: str) -> bool:
    """The split rule: it depends on the name only, never on the text."""
    return zlib.crc32(name.encode()) % HELD_OUT_EVERY == HELD_OUT_REST


def load_corpus() -> tuple[list[Document], list[Document]]:
    """Training documents and held-out documents, with no long line in common."""
    documents = [*_topics(), *_sources()]
    held_out = [d for d in documents if is_held_out(d.name)]
    hidden = {
        line.strip()
        for d in held_out
        for line in d.text.splitlines()
        if len(line.strip()) >= SHARED_LINE_CHARS
    }
    train = []
    for d in documents:
        if not is_held_out(d.name):
            lines = [x for x in d.text.splitlines(keepends=True) if x.strip() not in hidden]
            train.append(Document(d.name, d.kind, "".join(lines)))
    return train, held_out


def _task_examples(rng: random.Random, count: int) -> str:
    """Task sentences for the tokenizer, so that keys and digits get tokens of their own."""
    lines = []
    for _ in range(count):
        key, other = rng.sample(tasks.KEYS, 2)
        value = tasks.random_value(rng)
        lines += [
            tasks.needle_sentence(key, value),
            tasks.pair_line(key, value),
            tasks.assignment(key, other),
            tasks.variable_question(key) + " " + value,
        ]
    return "\n".join(lines)


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: digits single, line ends single, ``<|bos|>`` put first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # A digit takes the blank before it along; nothing is merged across a line end, so
            # that text can be tokenized line by line.
            pre_tokenizers.Split(Regex(r"\n| ?\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def make_tokenizer(train: list[Document], vocab_size: int, seed: int = 0) -> PreTrainedTokenizerFast:
    """The tokenizer of the bundled model: trained on prose, a part of the source, and tasks."""
    rng = random.Random(seed)
    texts = [d.text for d in train if d.kind != "source"]
    source = [d.text for d in train if d.kind == "source"]
    texts += rng.sample(source, len(source) // 4)
    texts.append(_task_examples(rng, 60_000))
    return train_tokenizer(texts, vocab_size)


class Lines:
    """Tokenized lines of documents, for drawing runs of consecutive lines quickly."""

    def __init__(self, documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> None:
        """Tokenize ``documents`` line by line (the tokenizer never merges across lines)."""
        lines = [x for d in documents for x in d.text.splitlines(keepends=True)]
        encoded = tokenizer(lines, add_special_tokens=False)["input_ids"]
        self.tokens = np.array([t for line in encoded for t in line], dtype=np.int16)
        self.ends = np.cumsum([len(line) for line in encoded])

    def run(self, rng: random.Random, budget: int) -> list[np.ndarray]:
        """Consecutive lines of at most ``budget`` tokens in all, from a random place."""
        total = len(self.tokens)
        budget = min(budget, total - 1)
        line = int(np.searchsorted(self.ends, rng.randrange(total - budget), side="left"))
        begin = int(self.ends[line])
        out: list[np.ndarray] = []
        used = 0
        while line + 1 < len(self.ends):
            line += 1
            end = int(self.ends[line])
            if used + end - begin > budget:
                break
            out.append(self.tokens[begin:end])
            used += end - begin
            begin = end
        return out

    def window(self, rng: random.Random, length: int) -> np.ndarray:
        """``length`` consecutive tokens from a random place."""
        start = rng.randrange(len(self.tokens) - length)
        return self.tokens[start : start + length]
