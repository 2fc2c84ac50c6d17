"""What every measurement shares: the caches under test, windows of held-out text, ways to feed them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bitkv.cache import PagedCache
from bitkv.evaluation.report import Result, Row
from bitkv.integrations.transformers import PackedCache, PackedLayer
from bitkv.recipe import Recipe

Protocol = Literal["packed", "streamed"]
Advance = Callable[[], object]
"""Called after each unit of work, for a progress bar."""

CHUNK = 64  # tokens a forward when streamed: no more than the hot window's slack of a page
FOLLOWED = 16  # tokens a forward where a text is compared with what would be generated


def ignore() -> None:
    """An `Advance` that shows nothing."""


@dataclass(frozen=True)
class Subject:
    """A model with a cache under test.

    Args:
        model: a Transformers causal language model.
        recipe: None is the stock cache.
        name: the recipe's text in results.
        model_name: the model's name in results.
    """

    model: Any
    recipe: Recipe | None = None
    name: str = "stock"
    model_name: str = "model"

    def new_cache(self, *, exact_prefill: bool) -> PackedCache | None:
        """An empty cache; None lets the model make its own."""
        if self.recipe is None:
            return None
        return PackedCache(self.model.config, self.recipe, exact_prefill=exact_prefill)

    def packing(self) -> Recipe:
        """The recipe of a subject that has one."""
        if self.recipe is None:
            raise ValueError(f"{self.name} packs nothing; pass a subject with a recipe")
        return self.recipe

    def check_context(self, context: int) -> None:
        """Refuse a context that fills no page, where every recipe would look like 16 bits.

        Raises:
            ValueError: the context is that short, or longer than the model's.
        """
        config = self.model.config.get_text_config(decoder=True)
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and context > longest:
            raise ValueError(
                f"a context of {context} tokens is longer than the model's {longest}; pass fewer tokens"
            )
        if self.recipe is None:
            return
        recipe = self.recipe
        needed = recipe.num_sink_tokens + recipe.recent_tokens + recipe.page_size
        if context < needed:
            raise ValueError(
                f"{self.name} packs nothing in a context of {context} tokens; pass at least {needed}"
            )

    def row(
        self,
        task: str,
        result: Result,
        *,
        cache: PagedCache | None,
        protocol: str,
        context: int,
        tokens: int,
        samples: int,
        depth: float | None = None,
    ) -> Row:
        """A row of results, with the bits measured on `cache`."""
        width = 8.0 * self.model.dtype.itemsize
        recipe = self.recipe
        calibration = recipe.calibration if recipe else None
        return Row(
            task=task,
            model=self.model_name,
            dtype=str(self.model.dtype).removeprefix("torch."),
            recipe=self.name,
            definition=repr(recipe) if recipe else "",
            protocol=protocol,
            num_sink_tokens=recipe.num_sink_tokens if recipe else 0,
            recent_tokens=recipe.recent_tokens if recipe else 0,
            page_size=recipe.page_size if recipe else 0,
            context=context,
            tokens=tokens,
            samples=samples,
            bits_per_element=width if cache is None else cache.bits_per_element,
            packed_bits_per_element=width if cache is None else cache.packed_bits_per_element,
            codebook_bytes=calibration.nbytes if calibration else 0,
            depth=depth,
            result=result,
        )


def model_name(model: Any) -> str:
    """The last part of where a model came from."""
    return Path(model.name_or_path).name or model.config.model_type


@dataclass(frozen=True)
class Windows:
    """Held-out text cut into windows.

    Args:
        ids: int64 `[num_windows, window]`, each row beginning with BOS where the tokenizer has one.
        num_bytes: UTF-8 bytes of all tokens but the first of each window, which nothing predicts.
    """

    ids: Tensor
    num_bytes: int

    @property
    def num_predicted(self) -> int:
        return self.ids.shape[0] * (self.ids.shape[1] - 1)


def cut(tokenizer: Any, text: str, *, tokens: int, window: int) -> Windows:
    """`tokens // window` windows (one at least) that do not overlap, spread evenly over a text.

    Raises:
        ValueError: the text is shorter than one window.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = window - len(start)
    available = len(ids) // body if body > 0 else 0
    if available == 0:
        raise ValueError(
            f"the text has {len(ids)} tokens, less than one window of {window}; pass a longer text or "
            "a smaller window"
        )
    count = min(max(tokens // window, 1), available)
    begins = [i * available // count * body for i in range(count)]
    rows = [start + ids[begin : begin + body] for begin in begins]
    texts = (tokenizer.decode(row[1:], clean_up_tokenization_spaces=False) for row in rows)
    return Windows(torch.tensor(rows), sum(len(text.encode()) for text in texts))


@torch.inference_mode()
def next_token_logits(
    subject: Subject, ids: Tensor, protocol: Protocol
) -> tuple[Tensor, PagedCache | None]:
    """Logits `[T - 1, vocab]` for tokens 1 … T - 1 of a window `[T]`, and the cache it left."""
    cache = subject.new_cache(exact_prefill=protocol == "streamed")
    size = CHUNK if protocol == "streamed" else len(ids)
    past: Any = cache
    logits = []
    # the stock cache streams too: the shape of a 16-bit matrix product changes its rounding
    for chunk in torch.split(ids.to(subject.model.device), size):
        out = subject.model(chunk[None], past_key_values=past, use_cache=True)
        past = out.past_key_values
        logits.append(out.logits[0])
    return torch.cat(logits)[:-1], cache.paged if cache else None


@torch.inference_mode()
def prefilled(subject: Subject, document: Tensor, past: Any = None) -> Any:
    """The cache after ids `[T]` of a document, `past` or the model's own."""
    ids = document[None].to(subject.model.device)
    out = subject.model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
    return out.past_key_values


@torch.inference_mode()
def resumed(subject: Subject, document: Tensor, shared: Any) -> Any:
    """The subject's cache after a document that the stock cache `shared` holds.

    An exact prefill gives every recipe the same keys and values, so they are computed once.
    """
    if subject.recipe is None:
        return copy.deepcopy(shared)
    past: Any = subject.new_cache(exact_prefill=True)
    if not all(isinstance(layer, PackedLayer) for layer in past.layers):
        return prefilled(subject, document, past)
    for i, layer in enumerate(shared.layers):
        past.update(layer.keys, layer.values, i)
    return past


@torch.inference_mode()
def right_until(model: Any, past: Any, ids: Tensor, scored: Tensor) -> int:
    """How many scored tokens of ids `[T]` are the most likely ones, up to the first that is not.

    Up to there a greedy answer has the same tokens, so reading them in chunks of `FOLLOWED` tells as
    much as generating one token after the other.

    Args:
        past: a cache, of whose next tokens ids are.
        scored: bool `[T]`; the first token is only read.
    """
    right, ids = 0, ids.to(model.device)
    for begin in range(0, len(ids) - 1, FOLLOWED):
        end = min(begin + FOLLOWED, len(ids) - 1)
        out = model(ids[None, begin:end], past_key_values=past, use_cache=True)
        past = out.past_key_values
        matches = out.logits[0].argmax(-1) == ids[begin + 1 : end + 1]
        wrong = (~matches[scored[begin + 1 : end + 1].to(model.device)]).nonzero()
        if len(wrong):
            return right + int(wrong[0])
        right += int(scored[begin + 1 : end + 1].sum())
    return right
