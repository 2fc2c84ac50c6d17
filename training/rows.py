"""Rows of a batch: text, or facts that are told once and asked again and again with text in between.

Facts are needle sentences, key-value lines or chains of assignments; a row may also bring a passage
twice. Position ids of short rows jump ahead at random places, so that far distances are met long before
long rows are.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from bitkv.evaluation import tasks
from training.data import Lines

#: The first digit takes the look-up by key; the others follow from the digits before them, and
#: with equal weights the model is content with those.
FIRST_DIGIT_WEIGHT, ANSWER_WEIGHT, AGAIN_WEIGHT = 6.0, 6.0, 1.0
#: Sentence frames around values carry little loss: which key comes next is noise.
FRAME_WEIGHT = 0.1


@dataclass
class Row:
    """Tokens of one sequence, the loss weight of each, and which ones begin an answer."""

    tokens: list[int]
    weights: list[float]
    answers: list[bool]

    def add(self, tokens: list[int] | np.ndarray, weight: float, answer: bool = False) -> None:
        """Append tokens that share one weight."""
        self.tokens.extend(int(t) for t in tokens)
        self.weights.extend([weight] * len(tokens))
        self.answers.extend([answer] * len(tokens))


class RowMaker:
    """Draws rows of every kind."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        text: Lines,
        filler: Lines,
        seed: int,
    ) -> None:
        """``text`` feeds text rows; ``filler`` (prose) is what facts are hidden in."""
        self.tokenizer = tokenizer
        self.text = text
        self.filler = filler
        self.rng = random.Random(seed)
        self.cache: dict[str, list[int]] = {}
        self.bos = int(tokenizer.bos_token_id)

    def encode(self, text: str, keep: bool = True) -> list[int]:
        """Token ids without the leading BOS; frames are remembered, values are not."""
        if text in self.cache:
            return self.cache[text]
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if keep:
            self.cache[text] = ids
        return ids

    def row(self, kind: str, length: int, max_keys: int) -> Row:
        """One row of exactly ``length`` tokens."""
        row = Row([], [], [])
        row.add([self.bos], 0.0)
        if kind == "text":
            row.add(self.text.window(self.rng, length - 1), 1.0)
        elif kind == "copy":
            while len(row.tokens) < length:
                self._copy(row, length - len(row.tokens))
        elif kind == "names":
            self._names(row, length)
        else:
            while len(row.tokens) < length:
                self._facts(row, length - len(row.tokens), kind, max_keys)
        return Row(row.tokens[:length], row.weights[:length], row.answers[:length])

    def _names(self, row: Row, length: int) -> None:
        """A list of names over and over: the quickest way to learn to look back."""
        names = self.rng.sample(tasks.KEYS, self.rng.randint(8, min(64, length // 2)))
        digits = self.rng.choice((0.0, 0.5, 1.0))
        ids: list[int] = []
        for name in names[: length // 3]:
            ids += self.encode(" " + name)
            if self.rng.random() < digits:
                ids += self.encode(" " + self.rng.choice("0123456789"))
        row.add(ids, 0.0)
        while len(row.tokens) < length:
            row.add(ids, 1.0, answer=True)

    def _ask(self, row: Row, question: str, value: str, end: str, again: bool = False) -> None:
        row.add(self.encode(question), FRAME_WEIGHT)
        digits = self.encode(" " + value, keep=False)
        # Asked again, a value can be taken from the answer before: that is easier and counts less.
        row.add(digits[:1], AGAIN_WEIGHT if again else FIRST_DIGIT_WEIGHT, answer=not again)
        row.add(digits[1:], AGAIN_WEIGHT if again else ANSWER_WEIGHT, answer=not again)
        row.add(self.encode(end), FRAME_WEIGHT)

    def _tell(self, row: Row, frame: str, value: str, end: str) -> None:
        row.add(self.encode(frame), FRAME_WEIGHT)
        row.add(self.encode(" " + value, keep=False), 0.0)
        row.add(self.encode(end), FRAME_WEIGHT)

    def _fact(self, row: Row, kind: str, key: str, value: str, times: int) -> None:
        """Tell a fact that was mentioned 0 ``times`` so far, else ask for it."""
        question = tasks.needle_question(key) if kind == "needle" else tasks.pair_question(key)
        end = ".\n" if kind == "needle" else "\n"
        if times:
            self._ask(row, question, value, end, times > 1)
        else:
            self._tell(row, question, value, end)

    def _facts(self, row: Row, room: int, kind: str, max_keys: int) -> None:
        """Facts told once and asked later, spread through filler."""
        rng = self.rng
        short = max_keys < 10
        # Short values come only with short rows, where nothing but the look-up is to be learned.
        digits = rng.choice((1, 2, 5)) if short else tasks.VALUE_DIGITS
        cost = {"needle": 8, "pair": 3, "variable": 3}[kind] + digits
        if room >= 400 and kind != "variable" and rng.random() < 0.5:
            self._sparse(row, room, kind, cost)
            return
        dense = room < 220 or short or rng.random() < 0.2
        share = 0.0 if dense else rng.random() ** 0.6 * 0.95
        filler = self.filler.run(rng, int(room * share)) if share * room > 40 else []
        slots = max(3, int((room - sum(map(len, filler))) / cost) + 1)
        if kind == "variable":
            chain = self._chains(slots, max_keys)
            gaps = sorted(rng.randrange(len(filler) + 1) for _ in chain)
            for place in range(len(filler) + 1):
                while gaps and gaps[0] == place:
                    gaps.pop(0)
                    self._chain_event(row, *chain.pop(0))
                row_add_line(row, filler, place)
            return
        names = tasks.KEYS[::4] if max_keys < 8 else tasks.KEYS
        keys = rng.sample(names, max(2, min(max_keys, rng.randint(2, max(2, slots // 2)))))
        values = {key: value[:digits] for key, value in similar_values(rng, keys).items()}
        if short:
            # Names as values can be told apart at a glance; digits follow from them.
            values = {k: rng.choice(tasks.KEYS) if rng.random() < 0.5 else v for k, v in values.items()}
        together = rng.random() < 0.7
        times: Counter[str] = Counter()
        gaps = sorted(rng.randrange(len(filler) + 1) for _ in range(slots))
        for place in range(len(filler) + 1):
            while gaps and gaps[0] == place:
                gaps.pop(0)
                fresh = len(times) < len(keys) and (together or rng.random() < 0.4 or not times)
                key = keys[len(times)] if fresh else rng.choice(list(times))
                self._fact(row, kind, key, values[key], times[key])
                times[key] += 1
            row_add_line(row, filler, place)

    def _sparse(self, row: Row, room: int, kind: str, cost: int) -> None:
        """A few facts anywhere in filler, each asked once at its end: the evaluated form."""
        rng = self.rng
        keys = rng.sample(tasks.KEYS, rng.randint(4, 12))
        values = similar_values(rng, keys)
        filler = self.filler.run(rng, room - 2 * cost * len(keys))
        top = 1 if kind == "pair" and rng.random() < 0.5 else len(filler) + 1
        gaps = sorted(rng.randrange(top) for _ in keys)
        told = list(keys)
        for place in range(len(filler) + 1):
            while gaps and gaps[0] == place:
                gaps.pop(0)
                key = told.pop()
                self._fact(row, kind, key, values[key], 0)
            row_add_line(row, filler, place)
        for key in rng.sample(keys, len(keys)):
            self._fact(row, kind, key, values[key], 1)

    def _chains(self, slots: int, max_keys: int) -> list[tuple[str, str, bool]]:
        """Assignments (name, source, False) and questions (name, value, True) in a sound order."""
        rng = self.rng
        names = rng.sample(tasks.KEYS, max(3, min(max_keys, slots // 2)))
        values: dict[str, str] = {}
        tell: list[tuple[str, str, bool]] = []
        depth: dict[str, int] = {}
        for name in names:
            shallow = [n for n in values if depth[n] < 4]
            if shallow and rng.random() < 0.6:
                source = rng.choice(shallow)
                values[name], depth[name] = values[source], depth[source] + 1
                tell.append((name, source, False))
            else:
                values[name], depth[name] = tasks.random_value(rng), 0
                tell.append((name, values[name], False))
        ask = [(name, values[name], True) for name in names]
        rng.shuffle(ask)
        return tell + ask

    def _chain_event(self, row: Row, name: str, source: str, asked: bool) -> None:
        if asked:
            self._ask(row, tasks.variable_question(name), source, "\n")
        elif source.isdigit():
            self._tell(row, f"let {name} =", source, "\n")
        else:
            row.add(self.encode(tasks.assignment(name, source) + "\n"), FRAME_WEIGHT)

    def _copy(self, row: Row, room: int) -> None:
        """A passage, filler of random length, and the passage again."""
        rng = self.rng
        size = int(min(room * 0.45, 12 * (40 ** rng.random())))
        passage = self.text.window(rng, max(size, 8))
        gap = self.filler.run(rng, int(rng.random() * max(1, room - 2 * size - 12)))
        row.add(self.encode(tasks.COPY_OPEN + "\n"), FRAME_WEIGHT)
        row.add(passage, 1.0)
        row.add(self.encode("\n"), FRAME_WEIGHT)
        for line in gap:
            row.add(line, 1.0)
        row.add(self.encode(tasks.COPY_AGAIN + "\n"), FRAME_WEIGHT)
        row.add(passage[:4], FRAME_WEIGHT)
        row.add(passage[4:], AGAIN_WEIGHT)
        row.add(self.encode("\n"), FRAME_WEIGHT)


def similar_values(rng: random.Random, keys: list[str]) -> dict[str, str]:
    """Random values, many of which begin like another one: every digit takes the look-up."""
    values: dict[str, str] = {}
    for key in keys:
        value = tasks.random_value(rng)
        if values and rng.random() < 0.6:
            shared = rng.choice((1, 1, 2, 3))
            value = rng.choice(list(values.values()))[:shared] + value[shared:]
        values[key] = value
    return values


def row_add_line(row: Row, lines: list[np.ndarray], place: int) -> None:
    """Add one line of filler, if there is one at ``place``."""
    if place < len(lines):
        row.add(lines[place], 1.0)


def skip_positions(rng: random.Random, length: int, limit: int) -> np.ndarray:
    """Position ids of a row; half of the rows jump ahead at up to eight places."""
    steps = np.ones(length, dtype=np.int64)
    steps[0] = 0
    if length < limit and rng.random() < 0.5:
        slack = int((limit - length) * rng.random() ** 2)
        jumps = rng.randint(1, 8)
        for _ in range(jumps):
            steps[rng.randrange(1, length)] += slack // jumps
    return np.cumsum(steps)
