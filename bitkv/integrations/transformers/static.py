"""One layer of a static Transformers cache: its decode steps run on the device alone."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitkv.attention import AttentionRequest, Backend, attend, choose
from bitkv.cache import PagedCache
from bitkv.integrations.transformers.layer import PackedLayer
from bitkv.integrations.transformers.masks import MaskReader
from bitkv.static import StaticLayer


class StaticPackedLayer(PackedLayer):
    """A `PackedLayer` with room for `max_cache_len` columns, as wide as its handles and masks are.

    A step, one token a sequence, is `StaticLayer.step` and attention. It changes no Python number and
    reads nothing back, so one graph, compiled or captured, serves all lengths. Whatever else happens is
    the host's, which first learns from the device how many columns steps have added.

    Every token of a step is real: a graph ignores its mask. Where none is being made, a mask that says
    otherwise is refused.
    """

    is_compileable = True

    _chosen: Backend

    def __init__(
        self,
        cache: PagedCache,
        layer_idx: int,
        masks: MaskReader,
        *,
        max_cache_len: int,
        exact_prefill: bool,
        backend: str,
    ) -> None:
        self.max_cache_len = max_cache_len
        self._padding = torch.zeros((), dtype=torch.int32)  # columns of sequence 0 that are none of its
        super().__init__(cache, layer_idx, masks, exact_prefill=exact_prefill, backend=backend)

    @property
    def paged(self) -> StaticLayer:
        layer = self.cache.layers[self.layer_idx]
        assert isinstance(layer, StaticLayer)
        return layer

    @property
    def width(self) -> int:
        return self.max_cache_len

    @property
    def columns(self) -> Tensor | None:
        """As the host knows them: steps have added real ones since."""
        return self._columns

    @columns.setter
    def columns(self, real: Tensor | None) -> None:
        self._columns = real
        if real is None:
            self._padding.zero_()
        else:
            self._padding = self._padding.to(real.device)
            self._padding.copy_((~real[0]).sum())

    # --- what Transformers asks of a layer -----------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take all room for a batch like `[B, Hkv, T, D]`; after `reset` it may be there already."""
        is_new = not self.is_initialized
        super().lazy_initialization(key_states, value_states)
        if is_new:
            if not self.paged.is_empty and not _alike(self.paged.hot_k, key_states):
                self.paged.reset()
            if self.paged.is_empty:
                self.paged.allocate(key_states)
            self._settle()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take new keys and values `[B, Hkv, T, D]`; a step stores them here. Returns handles to all.

        Raises:
            ValueError: more than a step in compiled code.
        """
        if not self.is_initialized or key_states.shape[2] > self.paged.step_tokens:
            if torch.compiler.is_compiling():
                _refuse_prompt()
            return super().update(key_states, value_states, *args, **kwargs)
        if self._pending is not None:
            self._flush()
        self.paged.step(key_states, value_states)
        return self._handle(key_states, 0), self._handle(value_states, 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks cover the whole cache.

        Raises:
            ValueError: the new columns do not fit; not told where a graph is being made.
        """
        if not self._in_graph():
            length = int(self.get_seq_length())
            if length + query_length > self.max_cache_len:
                raise ValueError(
                    f"{query_length} new columns after {length} are more than max_cache_len "
                    f"{self.max_cache_len}; make the cache with more"
                )
        return self.max_cache_len, 0

    def get_seq_length(self) -> Any:
        """Columns so far: on the device, once there are tensors."""
        if self._pending is not None or not self.is_initialized:
            return self.length
        return self.paged.packed_len[0] + self.paged.hot_len[0] + self._padding

    def get_max_length(self) -> int:
        return self.max_cache_len

    def reset(self) -> None:
        """Forget all tokens; tensors stay where they are, so that graphs remain valid."""
        self.paged.clear()
        self.length = 0
        self.columns = self._pending = self._dense = None
        self.is_initialized = False

    # --- storing and attending -----------------------------------------------------------------

    def can_attend(self, q: Tensor) -> bool:
        """Whether `attend` serves queries: a step stores its tokens before."""
        return super().can_attend(q) or q.shape[2] <= self.paged.step_tokens

    def attend(
        self, module: torch.nn.Module, q: Tensor, mask: Tensor | None, scale: float, **options: Any
    ) -> Tensor:
        """Attend to the cache, storing what is pending first; output `[B, Tq, Hq, D]`."""
        if self._pending is not None:
            return super().attend(module, q, mask, scale, **options)
        view = self.paged.view()
        if not self._in_graph():
            self.masks.check_step(mask, view.lengths)
        softcap = options.get("softcap")
        out, _ = attend(q, view, scale=scale, softcap=softcap, backend=self._chosen)
        return out.transpose(1, 2).contiguous()

    def dense(self) -> tuple[Tensor, Tensor]:
        """All keys and values `[B, Hkv, max_cache_len, D]`, zeros where there is no token."""
        self._dense = None  # steps come without notice
        k, v = (pad(x, (0, 0, 0, self.width - x.shape[2])) for x in super().dense())
        return k, v

    def _flush(self) -> None:
        """Also learn of the columns that steps have added, which waits for the device."""
        if self._pending is None and not self.paged.is_empty:
            known = self.length if self.columns is None else int(self.columns[0].sum())
            added = self.paged.lengths[0] - known
            self.length += added
            if added and self.columns is not None:
                self.columns = pad(self.columns, (0, added), value=True)
        super()._flush()

    def _in_graph(self) -> bool:
        """Whether a graph is being made, in which nothing can be read back."""
        if torch.compiler.is_compiling() or self.paged.is_empty:
            return torch.compiler.is_compiling()
        return self.paged.hot_k.is_cuda and torch.cuda.is_current_stream_capturing()

    def _gather(self, indices: Tensor) -> None:
        super()._gather(indices)
        self._settle()

    def restore(self, length: int, columns: Tensor | None) -> None:
        super().restore(length, columns)
        self._settle()

    def _settle(self) -> None:
        """What graphs need beforehand: who attends, and which tensors stay where they are."""
        if self.paged.is_empty:
            return
        view = self.paged.view()
        self._chosen = choose(AttentionRequest(view.hot_k, view, None, 1.0), self.backend)
        self._padding = self._padding.to(view.hot_k.device)
        for x in (*self.paged.tensors(), self._padding):
            torch._dynamo.mark_static_address(x)


def _alike(x: Tensor, y: Tensor) -> bool:
    """Whether tokens `y` `[B, Hkv, T, D]` fit a window `x`."""
    return (x.shape[0], x.dtype, x.device) == (y.shape[0], y.dtype, y.device)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _refuse_prompt() -> None:
    raise ValueError(
        "only steps of a static cache can be compiled, not the reading of a prompt; compile the model "
        "for one token at a time, and in generate() pass disable_compile=True with prefill_chunk_size"
    )
