"""What is asked of a generation run and what comes back: plain values, cheap to import."""

from dataclasses import dataclass

DTYPES = ("auto", "bfloat16", "float16", "float32")
"""What a model can be loaded in; "auto" is the checkpoint's own."""


@dataclass(frozen=True)
class Request:
    """What to generate, with plain values only, so that another process can be asked for it.

    Args:
        model: directory or hub id, None for the bundled model.
        recipe: text of a recipe, or None for the stock cache in the model's dtype.
        temperature: 0 is greedy; above it tokens are sampled, from `seed` on.
        prefill_chunk: read the prompt in chunks of so many tokens.
        load_cache, save_cache: files of a packed cache: what to continue from, and where to keep the
            cache as it is once the prompt is read.
        measure_memory: run once more before, for peak memory; see `bitkv.generation.peak_memory`.
    """

    prompt: str
    model: str | None = None
    recipe: str | None = "kivi2"
    backend: str = "auto"
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    prefill_chunk: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    load_cache: str | None = None
    save_cache: str | None = None
    measure_memory: bool = False


@dataclass(frozen=True)
class Run:
    """What was generated and what it took.

    Args:
        prompt_tokens: tokens read; `cached_tokens` more came from a loaded cache.
        token_ids: the new tokens.
        prefill_s, decode_s: seconds to the first new token, and for all others.
        cache_bytes: allocated for keys and values at the end.
        bits_per_element: of those keys and values; `packed_bits_per_element` beyond the hot window,
            None if nothing is packed.
        backend: what computed attention over the packed cache, None for the stock cache.
        peak_prefill_bytes, peak_decode_bytes: most memory above the loaded model; None if not measured.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    cached_tokens: int
    prefill_s: float
    decode_s: float
    cache_bytes: int
    bits_per_element: float
    packed_bits_per_element: float | None
    backend: str | None
    dtype: str
    device: str
    threads: int
    peak_prefill_bytes: int | None = None
    peak_decode_bytes: int | None = None

    @property
    def ms_per_token(self) -> float | None:
        """Mean time of a decode step; None if there was none."""
        steps = len(self.token_ids) - 1
        return 1000 * self.decode_s / steps if steps > 0 else None
