// Looking codes up by byte permutes: a table of 256 bytes fills four registers, and a few instructions look up 64
// tokens' codes in it. And keys as attention meets them: q . entry is tabulated once an item for each query row and
// group, in 16 bits, or in 8 where that is fine enough.
//
// For AVX-512 with VBMI. In isa_avx512.cpp its instructions stand in assembly: not every CPU that runs that file has them.
// No include guard: attend.h includes this once.

namespace bitkv::BITKV_ISA {

using V = __m512i;

constexpr int kVector = 64;  // tokens in a register of codes
constexpr int kTileVectors = kTileTokens / kVector;

inline V load_v(const void* p) { return _mm512_loadu_si512(p); }

// acc + sums of four products of unsigned and signed bytes, or of two products of words, in each lane.
inline V dot_bytes(V acc, V numbers, V entries) { return _mm512_dpbusd_epi32(acc, numbers, entries); }
inline V dot_words(V acc, V a, V b) { return _mm512_dpwssd_epi32(acc, a, b); }
// a where the mask has ones, b elsewhere
inline V select(V mask, V a, V b) { return _mm512_ternarylogic_epi32(mask, a, b, 0xca); }

#if defined(BITKV_MATRIX)
// Codes of 64 tokens, looked up in each quarter of a table: Intel's CPUs permute the bytes of one register in one
// instruction and those of two in three.
struct Index {
  V code;
  __mmask64 odd, upper, last;  // codes that point into the second or fourth quarter, the third or fourth, the fourth

  explicit Index(V code)
      : code(code), odd(_mm512_test_epi8_mask(code, _mm512_set1_epi8(64))), upper(_mm512_movepi8_mask(code)),
        last(_kand_mask64(odd, upper)) {}

  // What the codes point to in a table of 256 bytes.
  [[gnu::always_inline]] V look_up(const uint8_t* table) const {
    V x = _mm512_permutexvar_epi8(code, load_v(table));
    x = _mm512_mask_permutexvar_epi8(x, odd, code, load_v(table + 64));
    x = _mm512_mask_permutexvar_epi8(x, upper, code, load_v(table + 128));
    return _mm512_mask_permutexvar_epi8(x, last, code, load_v(table + 192));
  }
};
#else
// Codes of 64 tokens, and which half of a table each points into.
struct Index {
  V code;
  __mmask64 upper;

  explicit Index(V code) : code(code), upper(_mm512_movepi8_mask(code)) {}

  // What the codes point to in a table of 256 bytes.
  [[gnu::always_inline]] V look_up(const uint8_t* table) const {
    V low = code, high = code;
    asm("vpermi2b %2, %1, %0" : "+v"(low) : "v"(load_v(table)), "v"(load_v(table + 64)));
    asm("vpermi2b %2, %1, %0" : "+v"(high) : "v"(load_v(table + 128)), "v"(load_v(table + 192)));
    return _mm512_mask_blend_epi8(upper, low, high);
  }
};
#endif

// Codes of a tile as bytes, 64 tokens a vector: those of group g lie at from[v] + g * stride.
struct Codes {
  const uint8_t* from[kTileVectors];
  size_t stride;
  int page_size, vectors;
};

// A page's codes into a tile of bytes [groups][kTile].
inline void copy_codes(const CodePart& part, const uint8_t* data, uint8_t* out) {
  for (int g = 0; g < part.groups(); ++g, out += kTile) {
    if (part.bits == 8) {
      const uint8_t* from = data + size_t(g) * part.page_size;
      for (int t = 0; t < part.page_size; t += kVector) _mm512_storeu_si512(out + t, load_v(from + t));
      continue;
    }
    int32_t codes[kColumns];
    unpack_codes(part, data, g, codes);
    for (int t = 0; t < part.page_size; ++t) out[t] = uint8_t(codes[t]);
  }
}

// Scores and weights of 64 tokens that are looked up lie as if they had been dealt onto four registers: register i has
// tokens i, 4 + i, 8 + i and so on. Words of even and of odd tokens fall apart into these, and these together make bytes
// in the order of tokens, by shifts alone: permutes are what lookups wait for.
inline int dealt(int t) { return t / kVector * kVector + t % 4 * kLanes + t % kVector / 4; }

// Dword j in a quarter of output i was dword i in that quarter of input j.
inline void transpose_dwords(const V (&x)[4], V (&out)[4]) {
  const V low = _mm512_unpacklo_epi32(x[0], x[1]), low2 = _mm512_unpacklo_epi32(x[2], x[3]);
  const V high = _mm512_unpackhi_epi32(x[0], x[1]), high2 = _mm512_unpackhi_epi32(x[2], x[3]);
  out[0] = _mm512_unpacklo_epi64(low, low2), out[1] = _mm512_unpackhi_epi64(low, low2);
  out[2] = _mm512_unpacklo_epi64(high, high2), out[3] = _mm512_unpackhi_epi64(high, high2);
}

// Quarter j of output i was quarter i of input j.
inline void transpose_quarters(const V (&x)[4], V (&out)[4]) {
  const V p = _mm512_shuffle_i32x4(x[0], x[1], 0x44), q = _mm512_shuffle_i32x4(x[2], x[3], 0x44);
  const V r = _mm512_shuffle_i32x4(x[0], x[1], 0xee), t = _mm512_shuffle_i32x4(x[2], x[3], 0xee);
  out[0] = _mm512_shuffle_i32x4(p, q, 0x88), out[1] = _mm512_shuffle_i32x4(p, q, 0xdd);
  out[2] = _mm512_shuffle_i32x4(r, t, 0x88), out[3] = _mm512_shuffle_i32x4(r, t, 0xdd);
}

// Numbers of 64 tokens from their order, and back.
inline void deal(V (&x)[4]) {
  V y[4];
  transpose_quarters(x, y), transpose_dwords(y, x);
}
inline void undeal(V (&x)[4]) {
  V y[4];
  transpose_dwords(x, y), transpose_quarters(y, x);
}

// The same for rows of `tokens` numbers.
template <void (*kReorder)(V (&)[4])>
inline void reorder(float* x, int rows, int tokens) {
  for (int i = 0; i < rows; ++i, x += kTile) {
    for (int t = 0; t < tokens; t += kVector) {
      V y[4];
      repeat<4>([&](auto j) { y[j] = load_v(x + t + j * kLanes); });
      kReorder(y);
      repeat<4>([&](auto j) { _mm512_storeu_si512(x + t + j * kLanes, y[j]); });
    }
  }
}

// Halves of 64 tokens, dealt.
inline void deal_halves(const uint16_t* p, F (&out)[4]) {
  V x[4];
  repeat<4>([&](auto i) { x[i] = _mm512_castps_si512(load_half(p + i * kLanes).v); });
  deal(x);
  repeat<4>([&](auto i) { out[i] = F{_mm512_castsi512_ps(x[i])}; });
}

// 16-bit sums of even and of odd tokens as float32, dealt.
inline void put_words(V even, V odd, float unit, float offset, float* out) {
  const V low = _mm512_set1_epi32(0xffff);
  const V x[4] = {_mm512_and_si512(even, low), _mm512_and_si512(odd, low),  //
                  _mm512_srli_epi32(even, 16), _mm512_srli_epi32(odd, 16)};
  repeat<4>([&](auto i) { store(out + i * kLanes, fma(to_float(I{x[i]}), set(unit), set(offset))); });
}

// --- keys as attention meets them -----------------------------------------------------------------

// The tables of a query row: bytes [groups][256], and [groups][256] more for the low parts.
struct RowTables {
  float unit, offset, sum;  // a score is unit * sum of entries + offset; sum: of the query itself
  bool is_wide;
  uint8_t* bytes;
};

// products [H][groups][256] = x . entry, for H query rows x.
template <int H>
inline void multiply_entries(const Side& side, int head, const float* x, float* products) {
  const Tables tables(side, TableKind::keys, head);
  const int channels = side.codes.channels, groups = side.codes.groups();
  for (int g = 0; g < groups; ++g) {
    for (int e = 0; e < kEntries; e += 4 * kLanes) {
      F y[H][4];
      repeat<H>([&](auto h) { repeat<4>([&](auto i) { y[h][i] = set(0); }); });
      for (int c = g * channels; c < (g + 1) * channels; ++c) {
        F entry[4];
        repeat<4>([&](auto i) { entry[i] = load(tables.floats_of(c) + e + i * kLanes); });
        repeat<H>([&](auto h) {
          const F xc = set(x[h * side.width + c]);
          repeat<4>([&](auto i) { y[h][i] = fma(entry[i], xc, y[h][i]); });
        });
      }
      repeat<H>([&](auto h) {
        repeat<4>([&](auto i) { store(products + (h * groups + g) * kEntries + e + i * kLanes, y[h][i]); });
      });
    }
  }
}

// Rounds the products of a row x.
inline void tabulate_row(const Side& side, int head, const float* x, const float* products, RowTables& row) {
  const Tables tables(side, TableKind::keys, head);
  const int groups = side.codes.groups();
  float lows[kWidth], total = 0, widest = 0, error = 0;
  row.offset = row.sum = 0;
  for (int g = 0; g < groups; ++g) {
    F low = set(FLT_MAX), high = set(-FLT_MAX);
    for (int e = 0; e < kEntries; e += kLanes) {
      const F y = load(products + g * kEntries + e);
      low = min(low, y), high = max(high, y);
    }
    lows[g] = -max(set(0) - low);
    const float range = max(high) - lows[g];
    total += range, widest = std::max(widest, range), row.offset += lows[g];
  }
  for (int c = 0; c < side.width; ++c) error += x[c] * x[c] * tables.errors()[c], row.sum += x[c];
  row.unit = std::max(widest / 255, total / 65000);  // sums fit in words
  row.is_wide = float(groups) / 12 * row.unit * row.unit > kLookupShare * kLookupShare * error;
  if (row.is_wide) row.unit = total / 65000;
  const F inverse = set(row.unit > 1e-30f ? 1 / row.unit : 0);
  for (int g = 0; g < groups; ++g) {
    for (int e = 0; e < kEntries; e += kLanes) {
      const I y = to_int((load(products + g * kEntries + e) - set(lows[g])) * inverse);
      uint8_t* to = row.bytes + (row.is_wide ? 2 : 1) * g * kEntries + e;
      const V high = row.is_wide ? _mm512_srli_epi32(y.v, 8) : y.v;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(high));
      if (row.is_wide) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + kEntries), _mm512_cvtepi32_epi8(y.v));
    }
  }
}

// Scores of N vectors of tokens from vector `first` on, for H query rows in bytes.
template <int N, int H>
[[gnu::noinline]] void scan_rows(const Codes& codes, int groups, const RowTables* rows, int first, Fetch& fetch, float* scores) {
  V all[H][N], odd[H][N];  // sums of bytes in words: of all, which wrap around, and of the odd ones
  repeat<H>([&](auto h) { repeat<N>([&](auto v) { all[h][v] = odd[h][v] = _mm512_setzero_si512(); }); });
  for (int g = 0; g < groups; ++g) {
    fetch.steps(N);
    repeat<N>([&](auto v) __attribute__((always_inline)) {
      const Index index(load_v(codes.from[first + v] + g * codes.stride));
      repeat<H>([&](auto h) __attribute__((always_inline)) {
        const V x = index.look_up(rows[h].bytes + g * kEntries);
        all[h][v] = _mm512_add_epi16(all[h][v], x), odd[h][v] = _mm512_add_epi16(odd[h][v], _mm512_srli_epi16(x, 8));
      });
    });
  }
  repeat<H>([&](auto h) {
    repeat<N>([&](auto v) {
      const V even = _mm512_sub_epi16(all[h][v], _mm512_slli_epi16(odd[h][v], 8));
      put_words(even, odd[h][v], rows[h].unit, rows[h].offset, scores + h * kTile + (first + v) * kVector);
    });
  });
}

// The same for one row in words.
template <int N>
[[gnu::noinline]] void scan_wide_row(const Codes& codes, int groups, const RowTables& row, int first, Fetch& fetch, float* scores) {
  V even[N], odd[N];
  repeat<N>([&](auto v) { even[v] = odd[v] = _mm512_setzero_si512(); });
  for (int g = 0; g < groups; ++g) {
    const uint8_t* table = row.bytes + g * 2 * kEntries;
    fetch.steps(N);
    repeat<N>([&](auto v) __attribute__((always_inline)) {
      const Index index(load_v(codes.from[first + v] + g * codes.stride));
      const V high = index.look_up(table), low = index.look_up(table + kEntries), upper = _mm512_set1_epi16(int16_t(0xff00));
      even[v] = _mm512_add_epi16(even[v], select(upper, _mm512_slli_epi16(high, 8), low));
      odd[v] = _mm512_add_epi16(odd[v], select(upper, high, _mm512_srli_epi16(low, 8)));
    });
  }
  repeat<N>([&](auto v) { put_words(even[v], odd[v], row.unit, row.offset, scores + (first + v) * kVector); });
}

// Calls scan(first vector, their number as a constant: N or 1).
template <int N, class Fn>
inline void by_vectors(const Codes& codes, const Fn& scan) {
  int v = 0;
  for (; v + N <= codes.vectors; v += N) scan(v, std::integral_constant<int, N>());
  for (; v < codes.vectors; ++v) scan(v, std::integral_constant<int, 1>());
}

// How many of `count` rows go through a tile together: 4 share the masks of quarters, whose tables then stay in memory.
inline int rows_at_once(const RowTables* row, int count) {
  const auto narrow = [&](int n) {
    return n <= count && std::none_of(row, row + n, [](const RowTables& of) { return of.is_wide; });
  };
  return kHasMatrix && narrow(4) ? 4 : narrow(2) ? 2 : 1;
}

inline void score_codes(const Codes& codes, int groups, const RowTables* rows, int count, Fetch& fetch, float* scores) {
  for (int i = 0; i < count;) {
    const RowTables* row = rows + i;
    float* out = scores + i * kTile;
    const int at_once = rows_at_once(row, count - i);
    if (at_once == 4) by_vectors<1>(codes, [&](int v, auto n) { scan_rows<n(), 4>(codes, groups, row, v, fetch, out); });
    else if (at_once == 2) by_vectors<4>(codes, [&](int v, auto n) { scan_rows<n(), 2>(codes, groups, row, v, fetch, out); });
    else if (row->is_wide) by_vectors<8>(codes, [&](int v, auto n) { scan_wide_row<n()>(codes, groups, *row, v, fetch, out); });
    else by_vectors<8>(codes, [&](int v, auto n) { scan_rows<n(), 1>(codes, groups, row, v, fetch, out); });
    i += at_once;
  }
}

}  // namespace bitkv::BITKV_ISA
