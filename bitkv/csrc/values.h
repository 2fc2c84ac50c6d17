// Values, looked up: entries as bytes times weights as bytes, both with a second term where one byte costs too much.
//
// No include guard: attend.h includes this once.

namespace bitkv::BITKV_ISA {

// Weights of a tile as bytes: of each query row one row of bytes, then second terms of those where one would
// be too coarse.
struct ByteRows {
  alignas(64) uint8_t bytes[2 * kRows][kTile];
  float unit[2 * kRows];
  int row[2 * kRows];
  int high, count;
};

// What a row's weights are rounded to.
struct WeightUnit {
  float largest, total;
  bool is_coarse;
};

// Of H rows; `spread` as in Tables.
template <int H>
inline void find_weight_units(const float* weights, int tokens, float spread, WeightUnit* out) {
  F top[H], squares[H], sums[H];
  repeat<H>([&](auto h) { top[h] = squares[h] = sums[h] = set(0); });
  for (int t = 0; t < tokens; t += kLanes) {
    repeat<H>([&](auto h) {
      const F w = load(weights + h * kTile + t);
      top[h] = max(top[h], w), squares[h] = fma(w, w, squares[h]), sums[h] = sums[h] + w;
    });
  }
  float largest[H], square[H], total[H];
  maxima_of<H>(top, largest), sums_of<H>(squares, square), sums_of<H>(sums, total);
  for (int h = 0; h < H; ++h) {
    const float rounding = largest[h] * largest[h] * float(tokens) / (12 * 255 * 255.0f);
    out[h] = {largest[h], total[h], rounding * spread > kLookupShare * kLookupShare * square[h]};
  }
}

// Bytes of a row of weights in steps of largest / steps, shifted right.
inline void put_weights(const float* weights, int tokens, float largest, float steps, int shift, uint8_t* out) {
  const F inverse = set(largest > 1e-30f ? steps / largest : 0);
  for (int t = 0; t < tokens; t += kLanes) {
    const V y = _mm512_srli_epi32(to_int(load(weights + t) * inverse).v, unsigned(shift));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + t), _mm512_cvtepi32_epi8(y));
  }
}

// Weights [rows][kTile] as bytes, and their sums.
inline void round_weights(const float* weights, int rows, int tokens, float spread, ByteRows& out, float* totals) {
  out.high = out.count = rows;
  WeightUnit units[kRows];
  by_rows(rows, [&](int row, auto h) { find_weight_units<h()>(weights + row * kTile, tokens, spread, units + row); });
  for (int i = 0; i < rows; ++i) {
    const float* from = weights + i * kTile;
    const WeightUnit& unit = units[i];
    totals[i] = unit.total;
    out.row[i] = i, out.unit[i] = unit.largest / 255;
    put_weights(from, tokens, unit.largest, unit.is_coarse ? 65280 : 255, unit.is_coarse ? 8 : 0, out.bytes[i]);
    if (!unit.is_coarse) continue;
    out.row[out.count] = i, out.unit[out.count] = unit.largest / 65280;
    put_weights(from, tokens, unit.largest, 65280, 0, out.bytes[out.count++]);
  }
}

// The sums of sixteen registers.
inline V sums_of_sixteen(const V* x) {
  V t[8], u[4];
  for (int i = 0; i < 8; ++i) {
    t[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]));
  }
  for (int i = 0; i < 4; ++i) {
    u[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(t[2 * i], t[2 * i + 1]), _mm512_unpackhi_epi64(t[2 * i], t[2 * i + 1]));
  }
  const V v = _mm512_add_epi32(_mm512_shuffle_i32x4(u[0], u[1], 0x88), _mm512_shuffle_i32x4(u[0], u[1], 0xdd));
  const V w = _mm512_add_epi32(_mm512_shuffle_i32x4(u[2], u[3], 0x88), _mm512_shuffle_i32x4(u[2], u[3], 0xdd));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(v, w, 0x88), _mm512_shuffle_i32x4(v, w, 0xdd));
}

// out[h][c] = entries of C neighbouring channels times H rows of bytes.
template <int C, int H>
[[gnu::always_inline]] inline void multiply_values(const Codes& codes, const uint8_t* table, size_t at,
                                                   const uint8_t (*bytes)[kTile], V (*out)[kLanes]) {
  V acc[C][H];
  repeat<C>([&](auto c) { repeat<H>([&](auto h) { acc[c][h] = _mm512_setzero_si512(); }); });
  for (int v = 0; v < codes.vectors; ++v) {
    const Index index(load_v(codes.from[v] + at));
    V entry[C];
    repeat<C>([&](auto c) { entry[c] = index.look_up(table + c * kEntries); });
    repeat<H>([&](auto h) {
      const V weight = load_v(bytes[h] + v * kVector);
      repeat<C>([&](auto c) { acc[c][h] = dot_bytes(acc[c][h], weight, entry[c]); });
    });
  }
  repeat<C>([&](auto c) { repeat<H>([&](auto h) { out[h][c] = acc[c][h]; }); });
}

// Sums of H rows of bytes over all channels into out[row of the bytes]; `part` 1 for the entries' low parts.
template <int H>
[[gnu::noinline]] void scan_values(const Codes& codes, const Tables& tables, int channels, const ByteRows& rows, int row,
                                   int part, Fetch& fetch, float* out, int stride) {
  V acc[H][kLanes];
  for (int c = 0; c < tables.width; c += kLanes) {
    for (int i = 0; i < kLanes;) {
      const int group = (c + i) / channels;
      const uint8_t* table = tables.of(c + i) + part * tables.low();
      const size_t at = group * codes.stride;
      V(*to)[kLanes] = reinterpret_cast<V(*)[kLanes]>(&acc[0][i]);
      const bool two = (c + i + 1) / channels == group && i + 1 < kLanes;
      fetch.steps(codes.vectors);
      if (two) multiply_values<2, H>(codes, table, at, rows.bytes + row, to);
      else multiply_values<1, H>(codes, table, at, rows.bytes + row, to);
      i += 1 + two;
    }
    for (int h = 0; h < H; ++h) {
      float* sums = out + rows.row[row + h] * stride + c;
      const F unit = load(tables.units() + c) * set(rows.unit[row + h] * (part ? 1 : 256));
      store(sums, fma(to_float(I{sums_of_sixteen(acc[h])}), unit, load(sums)));
    }
  }
}

inline void add_values(const Codes& codes, Fetch& fetch, const Tables& tables, int channels, const ByteRows& rows,
                       float* out, int stride) {
  for (int part = 0; part < (tables.is_fine() ? 2 : 1); ++part) {
    const int count = part ? rows.high : rows.count;  // low parts of both are too small to matter
    int row = 0;
    for (; row + 4 <= count; row += 4) scan_values<4>(codes, tables, channels, rows, row, part, fetch, out, stride);
    if (row + 2 <= count) { scan_values<2>(codes, tables, channels, rows, row, part, fetch, out, stride); row += 2; }
    if (row < count) scan_values<1>(codes, tables, channels, rows, row, part, fetch, out, stride);
  }
}

}  // namespace bitkv::BITKV_ISA
