"""The compiled kernels of bitkv/csrc. A tensor is its address; a part is `PartFormat.numbers`.

dtypes are 0 float16, 1 bfloat16, 2 float32; strides count elements, of bytes for pages.
"""

_Part = tuple[int, int, int, int, int, int]
_CodePart = tuple[int, int, int, int, int]
_Codebook = tuple[int, int, int, int, int]  # data, heads, groups, entries, channels; contiguous float32
# codebook; restore, heads and width; inv_freq, their number, factor; tables; zeros for what is not there
_Shared = tuple[tuple[int, ...], tuple[int, int, int], tuple[int, int, float], int]

def isas() -> list[str]:
    """The instruction sets this CPU can run, best first."""

def attend(
    isa: str,
    queries: tuple[int, int, int, int, int],  # q, out, lse, positions or 0, dtype
    shape: tuple[int, int, int, int, int],  # batch, heads, kv_heads, queries, head_dim
    parts: tuple[list[int], list[int]],  # each a _Part or a _CodePart
    shared: tuple[_Shared, _Shared],
    pages: tuple[int, int, int],  # data, number, page_size
    tables: tuple[int, int, int],  # block_table, its width, packed_len
    # hot_k, hot_v, hot_len, dtype, capacity, batch stride, head stride, num_sink_tokens
    hot: tuple[int, int, int, int, int, int, int, int],
    scoring: tuple[float, int, float],  # scale, window, softcap
    threads: int,
    /,
) -> None:
    """Fill `out` and `lse`; ValueError for lengths and page numbers outside the tensors."""

def encode(
    isa: str,
    x: int,
    dtype: int,
    strides: tuple[int, int, int],  # page, head, token
    shape: tuple[int, int, int, int],  # pages, heads, page_size, head_dim
    part: _Part,
    is_key: bool,
    levels: int,
    out: int,
    out_strides: tuple[int, int],  # page, head
    threads: int,
    /,
) -> None:
    """Quantize and pack one part of some pages into `out`."""

def encode_codes(
    isa: str,
    x: int,
    dtype: int,
    strides: tuple[int, int, int],  # page, head, token
    shape: tuple[int, int],  # pages, heads
    part: _CodePart,
    codebook: _Codebook,
    out: int,
    out_strides: tuple[int, int],  # page, head
    threads: int,
    /,
) -> None:
    """Pack the nearest entries of a codebook for one part of some pages into `out`."""

def nearest(
    isa: str,
    x: int,  # float32, as the codebook
    codebook: int,
    out: int,  # int32
    shape: tuple[int, int, int, int],  # groups, points, channels, entries
    threads: int,
    /,
) -> None:
    """For each point `[groups, points, channels]` its nearest of `[groups, entries, channels]`."""

def tabulate(
    isa: str,
    codebook: _Codebook,
    width: int,
    kind: int,  # 0 values, 1 keys, 2 keys before the rotary embedding
    pairs: int,  # of channels that turn together
    out: int,
    threads: int,
    /,
) -> int:
    """Fill `out` with what kernels look codes up in; its bytes, 0 for none. Without `out` only these."""

def append(
    hot: tuple[int, int, int],  # hot_k, hot_v, hot_len
    hot_strides: tuple[int, int, int],  # batch, head, token; in bytes
    tokens: tuple[int, int],  # k, v
    strides: tuple[int, int, int],
    shape: tuple[int, int, int, int],  # batch, heads, tokens, bytes of a token
    start: int,
    /,
) -> None:
    """Put tokens into the hot window from its token `start` on, and count them in `hot_len`."""
