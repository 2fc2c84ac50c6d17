"""Slots of unfinished blocks, and the cutting of steps at the bounds of blocks; no engine needed."""

import random
from itertools import pairwise

import pytest
import torch

from bitkv.integrations.vllm.step import plan
from bitkv.integrations.vllm.tails import StaleSlot, Tails

SIZE = 8


class Scheduler:
    """As an engine does it: blocks from a shuffled free list, requests that begin, grow, end or vanish.

    What a slot holds is kept as (request, token) for each of its places, the way a layer writes it.
    """

    def __init__(self, seed: int, most: int = 6, blocks: int = 64):
        self.random = random.Random(seed)
        self.most = most
        self.free = list(range(blocks))
        self.random.shuffle(self.free)
        self.running: list[dict] = []
        self.tails = Tails(most + 1, SIZE)
        self.slots: dict[int, dict[int, tuple[int, int]]] = {}
        self.pages: dict[int, list[tuple[int, int]]] = {}
        self.born = 0

    def begin(self):
        if len(self.running) < self.most:
            self.born += 1
            goal = self.random.randint(1, 5 * SIZE)
            self.running.append({"name": self.born, "done": 0, "goal": goal, "blocks": []})

    def drop(self):
        """An abort or a preemption: blocks go back, and nobody is told."""
        if self.running:
            gone = self.running.pop(self.random.randrange(len(self.running)))
            self.free += gone["blocks"]

    def step(self):
        budget, lengths, starts, table, who = 3 * SIZE, [], [0], [], []
        for request in self.running:  # in their order, as far as the budget goes
            count = min(budget, self.random.choice([1, 1, 2, SIZE, 2 * SIZE + 3]))
            need = -(-(request["done"] + count) // SIZE)
            if count <= 0 or len(self.free) < need - len(request["blocks"]):
                break
            while len(request["blocks"]) < need:
                request["blocks"].append(self.free.pop(self.random.randrange(len(self.free))))
            budget -= count
            lengths.append(request["done"] + count)
            starts.append(starts[-1] + count)
            table.append(request["blocks"])
            who.append(request)
        if not who:
            return
        width = max(map(len, table))
        rows = torch.tensor([row + [0] * (width - len(row)) for row in table], dtype=torch.int32)
        step = plan(starts, lengths, rows, self.tails)
        self.tails.check()
        self.run(step, who, starts, lengths)
        for request, length in zip(who, lengths, strict=True):
            request["done"] = length
        self.running = [
            r for r in self.running if r["done"] < r["goal"] or self.free.extend(r["blocks"])
        ]

    def run(self, step, who, starts, lengths):
        """Writes tokens and packs blocks as a layer does, and looks at all that attention would read."""
        owner = [
            (request["name"], length - (end - begin) + i)
            for request, (begin, end), length in zip(who, pairwise(starts), lengths, strict=True)
            for i in range(end - begin)
        ]
        groups = [*step.pieces, *([] if step.singles is None else [step.singles])]
        windows = []
        for group in groups:
            for row in range(len(group.tokens)):
                slot, offset = int(group.slots[row]), int(group.offsets[row])
                held = dict(self.slots.get(slot, {}))
                count = int(group.hot_len[row]) - offset
                for i in range(count):
                    held[offset + i] = owner[int(group.tokens[row, i])]
                windows.append((group, row, held))
        for group, row, held in windows:
            name = held[int(group.offsets[row])][0]
            first = int(group.packed_len[row])
            for place in range(int(group.hot_len[row])):
                assert held[place] == (name, first + place)
            for packed in group.packed:
                if packed.row == row:
                    assert packed.first_token == first
                    self.pages[packed.block] = [held[i] for i in range(SIZE)]
        for group, row, held in windows:
            name = held[int(group.offsets[row])][0]
            for i in range(int(group.packed_len[row]) // SIZE):
                block = int(group.block_table[row, i])
                assert self.pages[block] == [(name, i * SIZE + j) for j in range(SIZE)]
            if row in group.keep.tolist():
                self.slots[int(group.slots[row])] = held


@pytest.mark.parametrize("seed", range(20))
def test_no_request_ever_reads_what_another_left(seed):
    engine = Scheduler(seed)
    for _ in range(300):
        engine.random.choice(
            [engine.begin, engine.begin, engine.step, engine.step, engine.step, engine.drop]
        )()


def table(*rows):
    return torch.tensor(rows, dtype=torch.int32)


def test_a_prompt_is_cut_at_the_bounds_of_blocks():
    step = plan([0, 20], [20], table([5, 6, 7]), Tails(2, SIZE))
    whole, rest = step.pieces
    assert step.singles is None
    assert whole.packed_len.tolist() == [0, 8]
    assert whole.hot_len.tolist() == [8, 8]
    assert [(p.block, p.first_token) for p in whole.packed] == [(5, 0), (6, 8)]
    assert whole.positions is None
    assert rest.packed_len.tolist() == [16]
    assert rest.hot_len.tolist() == [4]
    assert rest.tokens.tolist() == [[16, 17, 18, 19]]
    assert not rest.packed


def test_a_query_sees_its_own_block_exactly_and_earlier_ones_packed_however_a_prompt_is_cut():
    def seen(*cuts):
        tails, found, done = Tails(2, SIZE), {}, 0
        for stop in cuts:
            step = plan([0, stop - done], [stop], table([1, 2, 3, 4]), tails)
            for group in [*step.pieces, *([step.singles] if step.singles else [])]:
                for row in range(len(group.tokens)):
                    first = int(group.packed_len[row]) + int(group.offsets[row])
                    for place in range(first, int(group.packed_len[row] + group.hot_len[row])):
                        found[place] = int(group.packed_len[row])
            done = stop
        return found

    assert (
        seen(30)
        == seen(3, 8, 9, 10, 27, 30)
        == seen(*range(1, 31))
        == {t: t // SIZE * SIZE for t in range(30)}
    )


def test_rows_of_unequal_lengths_say_where_their_queries_are():
    tails = Tails(3, SIZE)
    plan([0, 2], [2], table([2]), tails)
    step = plan([0, 3, 8], [3, 7], table([1], [2]), tails)
    (group,) = step.pieces
    assert group.positions.tolist() == [[0, 1, 2, -1, -1], [2, 3, 4, 5, 6]]
    assert group.offsets.tolist() == [0, 2]


def test_a_block_that_lost_its_tokens_is_an_error_and_no_answer():
    with pytest.raises(StaleSlot, match="block 3 should hold 5 tokens and holds none"):
        plan([0, 1], [6], table([3]), Tails(2, SIZE))


def test_more_requests_than_slots_are_an_error():
    with pytest.raises(StaleSlot, match="all 2 slots"):
        plan([0, 1, 2, 3], [1, 1, 1], table([1], [2], [3]), Tails(2, SIZE))
