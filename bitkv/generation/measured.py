"""One measured generation run: load, warm up, prefill, decode; text as it comes, figures at the end."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, TextStreamer

from bitkv.attention import last_backend
from bitkv.generation import checkpoint
from bitkv.generation.peak_memory import keep_freed_memory, peak_memory
from bitkv.generation.request import Request, Run
from bitkv.integrations.transformers import PackedCache

_WARM_UP_TOKENS = 320  # enough for every preset to pack a page


def generate(request: Request, on_text: Callable[[str], None]) -> Run:
    """Run a request, calling `on_text` with each piece of text as it is complete.

    Raises:
        ValueError: the model, the recipe, the cache file or the prompt cannot be served.
    """
    name = checkpoint.locate(request.model)
    config = checkpoint.load_config(name)
    _empty_cache(config, request)  # refuses before anything large is loaded
    tokenizer = checkpoint.load_tokenizer(name)
    is_start = request.load_cache is None
    ids = tokenizer(request.prompt, add_special_tokens=is_start, return_tensors="pt")["input_ids"]
    _check_length(config, request, ids.shape[1])
    model = checkpoint.load_model(name, request.dtype, request.device)
    generation = _Generation(request, model, tokenizer, ids.to(model.device))
    generation.warm_up()
    if not request.measure_memory:
        return generation.timed(on_text)
    prefill, decode = generation.peaks()
    keep_freed_memory()
    generation.warm_up()
    run = generation.timed(on_text)
    return dataclasses.replace(run, peak_prefill_bytes=prefill, peak_decode_bytes=decode)


def _empty_cache(config: Any, request: Request) -> Any:
    if request.recipe is None:
        return DynamicCache(config=config)
    return PackedCache(config, request.recipe, backend=request.backend)


def _check_length(config: Any, request: Request, prompt: int, cached: int = 0) -> None:
    if prompt == 0:
        raise ValueError("the prompt is empty; pass a text of at least one token")
    limit = checkpoint.context_limit(config)
    excess = cached + prompt + request.max_new_tokens - (limit or 0)
    if limit is not None and excess > 0:
        before = f" after {cached:,} cached ones" if cached else ""
        new = request.max_new_tokens
        raise ValueError(
            f"the prompt has {prompt:,} tokens{before} and {new:,} new ones are asked for, "
            f"but the model's context is {limit:,}; shorten the prompt or the answer by {excess:,}"
        )


class _Generation:
    """A loaded model with a prompt `ids` `[1, T]`; each pass has a cache of its own."""

    def __init__(self, request: Request, model: Any, tokenizer: Any, ids: Tensor) -> None:
        self.request, self.model, self.tokenizer, self.ids = request, model, tokenizer, ids

    def warm_up(self) -> None:
        """Pay for what only happens once."""
        cache = _empty_cache(self.model.config, self.request)
        self._generate(self.ids[:, :_WARM_UP_TOKENS], cache, self._meter(), new_tokens=2)

    def timed(self, on_text: Callable[[str], None]) -> Run:
        """The run itself."""
        request = self.request
        cache = self._cache()
        cached = cache.get_seq_length()

        def save() -> None:
            if request.save_cache is not None:
                cache.save(request.save_cache)

        meter = self._meter(on_text, save)
        self._generate(self.ids, cache, meter, request.max_new_tokens)
        bits, packed_bits = _bits(cache)
        return Run(
            text=meter.text,
            token_ids=meter.token_ids,
            prompt_tokens=self.ids.shape[1],
            cached_tokens=cached,
            prefill_s=meter.prefill_s,
            decode_s=meter.decode_s,
            cache_bytes=_nbytes(cache),
            bits_per_element=bits,
            packed_bits_per_element=packed_bits,
            backend=last_backend() if isinstance(cache, PackedCache) else None,
            dtype=str(self.model.dtype).removeprefix("torch."),
            device=self.model.device.type,
            threads=torch.get_num_threads(),
        )

    def peaks(self) -> tuple[int, int]:
        """Most bytes above the loaded model while the prompt is read, and while tokens are decoded."""
        peak = peak_memory(self.model.device)
        peak.reset()
        loaded = peak.read()
        prefill: list[int] = []

        def prefilled() -> None:
            prefill.append(peak.read() - loaded)
            peak.reset()

        meter = self._meter(on_prefilled=prefilled)
        self._generate(self.ids, self._cache(), meter, self.request.max_new_tokens)
        return max(prefill[0], 0), max(peak.read() - loaded, 0)

    def _cache(self) -> Any:
        cache = _empty_cache(self.model.config, self.request)
        if self.request.load_cache is not None:
            cache.load(self.request.load_cache)
            _check_length(self.model.config, self.request, self.ids.shape[1], cache.get_seq_length())
        return cache

    def _meter(
        self,
        on_text: Callable[[str], None] = lambda text: None,
        on_prefilled: Callable[[], None] = lambda: None,
    ) -> "_Meter":
        return _Meter(self.tokenizer, on_text, on_prefilled)

    def _generate(self, ids: Tensor, cache: Any, meter: "_Meter", new_tokens: int) -> None:
        request = self.request
        sampling: dict[str, Any] = {"do_sample": False}
        if request.temperature > 0:
            sampling = {
                "do_sample": True,
                "temperature": request.temperature,
                "top_p": request.top_p,
                "top_k": request.top_k,
            }
        chosen = GenerationConfig(
            max_new_tokens=new_tokens, prefill_chunk_size=request.prefill_chunk, **sampling
        )
        # a mask longer than the ids says that the cache holds the tokens before them
        mask = ids.new_ones(1, cache.get_seq_length() + ids.shape[1])
        torch.manual_seed(request.seed)
        with torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=mask,
                past_key_values=cache,
                streamer=meter,
                generation_config=chosen,
            )


class _Meter(TextStreamer):  # type: ignore[misc]
    """Takes the time as tokens come, and hands on their text in whole words."""

    def __init__(
        self, tokenizer: Any, on_text: Callable[[str], None], on_prefilled: Callable[[], None]
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text, self.on_prefilled = on_text, on_prefilled
        self.token_ids: list[int] = []
        self.text = ""
        self.prefill_s = self.decode_s = 0.0

    def put(self, value: Tensor) -> None:
        """The prompt before it is read, then each new token."""
        now = time.perf_counter()
        if self.next_tokens_are_prompt:
            self._started = now
        elif not self.token_ids:
            self.prefill_s = now - self._started
            self.on_prefilled()
            self._started = time.perf_counter()
        else:
            self.decode_s = now - self._started
        if not self.next_tokens_are_prompt:
            self.token_ids += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by TextStreamer with each finished piece."""
        self.text += text
        if text:
            self.on_text(text)


def _nbytes(cache: Any) -> int:
    """Bytes allocated for keys and values."""
    if isinstance(cache, PackedCache):
        return cache.nbytes
    tensors = (x for layer in cache.layers for x in (layer.keys, layer.values))
    return sum(x.nbytes for x in tensors if x is not None)


def _bits(cache: Any) -> tuple[float, float | None]:
    """Bits per element with the hot window, and beyond it (None if nothing is packed)."""
    if isinstance(cache, PackedCache):
        return cache.bits_per_element, cache.paged.packed_bits_per_element or None
    elements = (8 * layer.keys.dtype.itemsize for layer in cache.layers if layer.is_initialized)
    return float(next(elements)), None
