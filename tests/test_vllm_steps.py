"""bitkv in vLLM without vLLM: slots of unfinished blocks, steps cut at blocks, a layer's attention."""

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from bitkv.codecs import Affine
from bitkv.integrations.vllm.step import plan
from bitkv.integrations.vllm.store import CHECK, LayerStore, Scoring
from bitkv.integrations.vllm.tails import StaleSlot, Tails
from bitkv.packing import Packing

SIZE = 8  # tokens of a block, where nothing is packed
PAGE, HEADS, SHARED, DIM = 64, 2, 3, 32


class Request:
    """A sequence of random queries, keys and values; `like` is one whose blocks it begins with."""

    def __init__(self, goal: int, like: "Request | None" = None, blocks: Sequence[int] = ()):
        self.q = torch.randn(goal, HEADS * SHARED, DIM)
        self.k, self.v = torch.randn(2, goal, HEADS, DIM)
        self.blocks = list(blocks)
        self.done = len(self.blocks) * PAGE  # found in the prefix cache
        if like is not None:
            self.k[: self.done], self.v[: self.done] = like.k[: self.done], like.v[: self.done]


class Engine:
    """A scheduler as vLLM's is, with one layer's store: running requests in their order as far as tokens
    of a step go, blocks from a free list and shared when full, requests that vanish without a word.
    """

    def __init__(self, seed: int, most: int = 5, blocks: int = 48):
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.most, self.running = most, []
        self.free, self.owners = list(range(blocks)), dict.fromkeys(range(blocks), 0)
        self.tails = Tails(most, PAGE)
        codecs = Affine(2, "channel", "page"), Affine(4, "token", "page")
        like = torch.zeros(1, HEADS, 1, DIM)
        self.packing = Packing.of(*codecs, like, page_size=PAGE, layout=None, rope=None)
        nbytes = self.packing.format.page_bytes
        pages = torch.full((blocks, HEADS, nbytes + 64), 0xFF, dtype=torch.uint8)  # NaN if read
        self.store = LayerStore(self.packing, pages, most, torch.float32)
        self.queries = self.vanished = self.prefixes = 0

    def begin(self) -> None:
        if len(self.running) == self.most:
            return
        long = [self.random.randint(2, 6 * PAGE) for _ in range(6)]
        goal = self.random.choice([1, PAGE - 1, PAGE, PAGE + 1, *long])
        others = [r for r in self.running if r.done >= PAGE and goal > PAGE]
        if others and self.random.random() < 0.5:
            other = self.random.choice(others)
            shared = other.blocks[: min(other.done, goal - 1) // PAGE]
            self.prefixes += bool(shared)
            self.running.append(Request(goal, other, shared))
            self.own(shared)
        else:
            self.running.append(Request(goal))

    def own(self, blocks: list[int]) -> None:
        for block in blocks:
            self.owners[block] += 1

    def vanish(self, request: Request) -> None:
        """Blocks that nobody else has go back to the free list."""
        self.running.remove(request)
        for block in request.blocks:
            self.owners[block] -= 1
            if not self.owners[block]:
                self.free.append(block)

    def abort(self) -> None:
        if self.running:
            self.vanish(self.random.choice(self.running))
            self.vanished += 1

    def step(self) -> None:
        budget, scheduled = 2 * PAGE, []
        for request in self.running:
            count = self.random.choice([1, 1, 1, 5, PAGE, PAGE + 9])
            count = min(budget, count, len(request.k) - request.done)
            need = -(-(request.done + count) // PAGE) - len(request.blocks)
            if count == 0 or len(self.free) < need:
                break
            new = [self.free.pop(self.random.randrange(len(self.free))) for _ in range(need)]
            request.blocks += new
            self.own(new)
            budget -= count
            scheduled.append((request, request.done, request.done + count))
            request.done += count
        if not scheduled:
            return
        self.run(scheduled)
        for request, *_ in scheduled:
            if request.done == len(request.k):
                self.vanish(request)

    def run(self, scheduled: list[tuple[Request, int, int]]) -> None:
        """What the store answers is what exact arithmetic says of each request by itself."""
        starts = [0]
        for _, start, stop in scheduled:
            starts.append(starts[-1] + stop - start)
        width = max(len(request.blocks) for request, *_ in scheduled)
        rows = [request.blocks + [0] * (width - len(request.blocks)) for request, *_ in scheduled]
        table = torch.tensor(rows, dtype=torch.int32)
        step = plan(starts, [stop for *_, stop in scheduled], table, self.tails)
        self.tails.check()
        q, k, v = (
            torch.cat([getattr(request, name)[start:stop] for request, start, stop in scheduled])
            for name in "qkv"
        )
        out = torch.full_like(q, torch.nan)
        self.store.run(step, q, k, v, out, Scoring(DIM**-0.5, None))
        expected = torch.cat([self.expected(*each) for each in scheduled])
        # a tenth of what quantization does to such data is 0.03
        torch.testing.assert_close(out.double(), expected, atol=0.03, rtol=0)
        self.queries += len(q)

    def expected(self, request: Request, start: int, stop: int) -> Tensor:
        """Earlier blocks as their pages have them, the query's own block exactly; float64."""
        rows = []
        for t in range(start, stop):
            whole = t // PAGE * PAGE
            k, v = (x[: t + 1].double().clone() for x in (request.k, request.v))
            if whole:
                k[:whole], v[:whole] = (x.double() for x in self.packed(request, whole))
            k, v = (x.repeat_interleave(SHARED, 1) for x in (k, v))
            weights = torch.einsum("hd,thd->ht", request.q[t].double(), k).mul(DIM**-0.5).softmax(-1)
            rows.append(torch.einsum("ht,thd->hd", weights, v))
        return torch.stack(rows)

    def packed(self, request: Request, whole: int) -> tuple[Tensor, Tensor]:
        """The first tokens of a request, packed here and read back: `[whole, H, D]` each."""
        form, count = self.packing.format, whole // PAGE
        pages = torch.empty(count, HEADS, form.page_bytes, dtype=torch.uint8)
        k, v = (x[:whole].transpose(0, 1).contiguous() for x in (request.k, request.v))
        self.packing.encode(k, v, pages, first_token=0)
        k, v = form.dequantize(pages, self.packing.key_shared, self.packing.value_shared, None)
        return tuple(x.transpose(1, 2).flatten(0, 1) for x in (k, v))


@pytest.mark.parametrize("seed", range(8))
def test_a_request_gets_its_own_answers_whoever_else_came_went_or_shared_its_blocks(seed, monkeypatch):
    monkeypatch.setenv(CHECK, "1")
    engine = Engine(seed)
    for _ in range(400):
        engine.random.choice([*2 * [engine.begin], *5 * [engine.step], engine.abort])()
    assert engine.queries > 300
    assert engine.vanished > 5
    assert engine.prefixes > 0


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
    with pytest.raises(StaleSlot, match="no slot is left for the 3 blocks of this step"):
        plan([0, 1, 2, 3], [1, 1, 1], table([1], [2], [3]), Tails(2, SIZE))
