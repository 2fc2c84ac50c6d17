// Values, looked up: entries as bytes times weights as bytes, both with a second term where one byte costs too much.
//
// No include guard: attend.h includes this once.

namespace bitkv::BITKV_ISA {

// A row of a tile's weights, dealt, as bytes: all of each weight, or its high or its low byte where one would be too coarse.
struct ByteRow {
  const float* weights;
  float inverse, unit;  // of what the bytes are multiples of
  int row;              // of the queries
  bool is_half;
  unsigned shift;       // of a half

  // Bytes of 64 tokens.
  V at(int t) const {
    V y[4];
    repeat<4>([&](auto i) { y[i] = to_int(load(weights + t + i * kLanes) * set(inverse)).v; });
    if (is_half) repeat<4>([&](auto i) { y[i] = _mm512_and_si512(_mm512_srli_epi32(y[i], shift), _mm512_set1_epi32(255)); });
    const V half = _mm512_or_si512(y[0], _mm512_slli_epi32(y[1], 8));
    return _mm512_ternarylogic_epi32(half, _mm512_slli_epi32(y[2], 16), _mm512_slli_epi32(y[3], 24), 0xfe);
  }
};

// Of each query row one row of bytes, then second terms.
struct ByteRows {
  ByteRow of[2 * kRows];
  int high, count;
};

// Quads where they are transposed to their order: dword 4 i + l is at 4 l + i, or comes from there.
inline V in_order(V x) {
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), x);
}

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

// Weights [rows][kTile] as rows of bytes, and their sums.
inline void round_weights(const float* weights, int rows, int tokens, float spread, ByteRows& out, float* totals) {
  out.high = out.count = rows;
  WeightUnit units[kRows];
  by_rows(rows, [&](int row, auto h) { find_weight_units<h()>(weights + row * kTile, tokens, spread, units + row); });
  for (int i = 0; i < rows; ++i) {
    const WeightUnit& unit = units[i];
    const float steps = unit.is_coarse ? 65280 : 255;
    ByteRow of{weights + i * kTile, unit.largest > 1e-30f ? steps / unit.largest : 0, unit.largest / 255, i, unit.is_coarse, 8};
    totals[i] = unit.total;
    out.of[i] = of;
    if (!unit.is_coarse) continue;
    of.unit = unit.largest / steps, of.shift = 0;
    out.of[out.count++] = of;
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
    V weight[H];
    repeat<H>([&](auto h) { weight[h] = load_v(bytes[h] + v * kVector); });
    repeat<C>([&](auto c) {
      const V entry = index.look_up(table + c * kEntries);
      repeat<H>([&](auto h) { acc[c][h] = dot_bytes(acc[c][h], weight[h], entry); });
    });
  }
  repeat<C>([&](auto c) { repeat<H>([&](auto h) { out[h][c] = acc[c][h]; }); });
}

// Calls fn(how many neighbouring channels share a code, as a constant: up to kMost).
template <int kMost, class Fn>
inline void by_sharing(int channels, const Fn& fn) {
  if (kMost == 8 && channels % 8 == 0) fn(std::integral_constant<int, 8>());
  else if (kMost == 8 && channels % 4 == 0) fn(std::integral_constant<int, 4>());
  else if (channels % 2 == 0) fn(std::integral_constant<int, 2>());
  else fn(std::integral_constant<int, 1>());
}

// Rows of a tile's bytes as they are multiplied without the matrix unit.
struct PlainValues { alignas(64) uint8_t bytes[4][kTile]; };

// Sums of H rows of bytes over all channels, C at a time, into out[query row]. `part`: 1 for the entries' low parts.
template <int C, int H>
[[gnu::noinline]] void scan_values(const Codes& codes, const Tables& tables, int channels, const ByteRow* rows, int part,
                                   PlainValues& room, Fetch& fetch, float* out, int stride) {
  for (int h = 0; h < H; ++h) {
    for (int v = 0; v < codes.vectors; ++v) _mm512_store_si512(room.bytes[h] + v * kVector, rows[h].at(v * kVector));
  }
  V acc[H][kLanes];
  for (int c = 0; c < tables.width; c += kLanes) {
    for (int i = 0; i < kLanes; i += C) {
      fetch.steps(codes.vectors);
      multiply_values<C, H>(codes, tables.of(c + i) + part * tables.low(), (c + i) / channels * codes.stride, room.bytes,
                            reinterpret_cast<V(*)[kLanes]>(&acc[0][i]));
    }
    for (int h = 0; h < H; ++h) {
      float* sums = out + rows[h].row * stride + c;
      const F unit = load(tables.units() + c) * set(rows[h].unit * (part ? 1 : 256));
      store(sums, fma(to_float(I{sums_of_sixteen(acc[h])}), unit, load(sums)));
    }
  }
}

// What the matrix unit is given: entries of sixteen channels, and weights in quads of tokens, `columns` rows in each.
struct MatrixValues {
  alignas(64) uint8_t entries[2][kMatrixRows][kMatrixBytes];  // of a vector of tokens and of that before it
  alignas(64) int32_t weights[kTileVectors * kMatrixRows * kMatrixRows];
  alignas(64) int32_t sums[kMatrixRows * kMatrixRows];
};

using ValueRoom = std::conditional_t<kHasMatrix, MatrixValues, PlainValues>;

// Quarters of a register that lie `stride` numbers apart.
inline V load_quarters(const int32_t* p, int stride) {
  const auto quarter = [&](int l) { return _mm_load_si128(reinterpret_cast<const __m128i*>(p + l * stride)); };
  const V x = _mm512_mask_broadcast_i32x4(_mm512_broadcast_i32x4(quarter(0)), 0x00f0, quarter(1));
  return _mm512_mask_broadcast_i32x4(_mm512_mask_broadcast_i32x4(x, 0x0f00, quarter(2)), 0xf000, quarter(3));
}
inline void store_quarters(V x, int32_t* p, int stride) {
  repeat<4>([&](auto l) {
    _mm_store_si128(reinterpret_cast<__m128i*>(p + l * stride), _mm512_extracti32x4_epi32(x, decltype(l)::value));
  });
}

// Bytes of rows as the matrix unit wants them; those beyond the last are never looked at.
inline void put_weights_in_quads(const ByteRow* rows, int count, int columns, int vectors, int32_t* out) {
  for (int v = 0; v < vectors; ++v, out += kMatrixRows * columns) {
    for (int h = 0; h < columns; h += 4) {
      V x[4], quads[4];  // quarter l of register i: quad 4 i + l of four rows
      repeat<4>([&](auto i) { x[i] = in_order(rows[std::min(h + i, count - 1)].at(v * kVector)); });
      transpose_dwords(x, quads);
      repeat<4>([&](auto i) { store_quarters(quads[i], out + 4 * i * columns + h, columns); });
    }
  }
}

// Entries of vector v in sixteen channels, C at a time.
template <int C>
[[gnu::always_inline]] inline void put_entries(const Codes& codes, const uint8_t* table, int channels, int c, int v,
                                               uint8_t (*to)[kMatrixBytes]) {
  for (int i = 0; i < kMatrixRows; i += C) {
    const Index index(load_v(codes.from[v] + (c + i) / channels * codes.stride));
    repeat<C>([&](auto j) { _mm512_store_si512(to[i + j], index.look_up(table + (i + j) * kEntries)); });
  }
}

// Sums of sixteen channels into register 7. A vector of tokens is multiplied when the next one has been looked up, and what
// was stored is in the cache.
template <int C>
[[gnu::noinline]] void sum_channels(const Codes& codes, const uint8_t* table, int channels, int c, int columns,
                                    MatrixValues& room, Fetch& fetch) {
  const auto multiply = [&](int v) {
    Matrix::load<5>(room.entries[v % 2], kMatrixBytes);
    Matrix::load<6>(room.weights + v * kMatrixRows * columns, columns * 4);
    Matrix::dot<7, 5, 6>();
  };
  Matrix::zero<7>();
  for (int v = 0; v < codes.vectors; ++v) {
    fetch.steps(kMatrixRows / 2);
    put_entries<C>(codes, table, channels, c, v, room.entries[v % 2]);
    if (v > 0) multiply(v - 1);
  }
  multiply(codes.vectors - 1);
}

// As scan_values, for up to sixteen rows of bytes, by the matrix unit.
[[gnu::noinline]] inline void sum_values_by_matrix(const Codes& codes, const Tables& tables, int channels, const ByteRow* rows,
                                                   int count, int part, Matrix& matrix, MatrixValues& room, Fetch& fetch,
                                                   float* out, int stride) {
  const int columns = (count + 3) / 4 * 4;
  matrix.shape_columns(columns);
  put_weights_in_quads(rows, count, columns, codes.vectors, room.weights);
  for (int c = 0; c < tables.width; c += kMatrixRows) {
    const uint8_t* table = tables.of(c) + part * tables.low();
    by_sharing<8>(channels, [&](auto n) { sum_channels<n()>(codes, table, channels, c, columns, room, fetch); });
    Matrix::store<7>(room.sums, columns * 4);
    for (int h = 0; h < count; h += 4) {
      V x[4], sums[4];  // quarter l of input i: channel 4 i + l in four rows
      repeat<4>([&](auto i) { x[i] = load_quarters(room.sums + 4 * i * columns + h, columns); });
      transpose_dwords(x, sums);
      for (int i = 0; i < std::min(4, count - h); ++i) {
        const ByteRow& row = rows[h + i];
        const F unit = set(row.unit * (part ? 1 : 256)) * load(tables.units() + c);
        float* to = out + row.row * stride + c;
        store(to, fma(to_float(I{in_order(sums[i])}), unit, load(to)));
      }
    }
  }
}

// Sums of rows of bytes, with either room.
inline void sum_values(const Codes& codes, const Tables& tables, int channels, const ByteRow* rows, int count, int part,
                       Matrix&, PlainValues& room, Fetch& fetch, float* out, int stride) {
  by_sharing<2>(channels, [&](auto n) {
    by_four_rows(count, [&](int row, auto h) {
      scan_values<n(), h()>(codes, tables, channels, rows + row, part, room, fetch, out, stride);
    });
  });
}
inline void sum_values(const Codes& codes, const Tables& tables, int channels, const ByteRow* rows, int count, int part,
                       Matrix& matrix, MatrixValues& room, Fetch& fetch, float* out, int stride) {
  for (int row = 0; row < count; row += kMatrixRows) {
    const int n = std::min(kMatrixRows, count - row);
    sum_values_by_matrix(codes, tables, channels, rows + row, n, part, matrix, room, fetch, out, stride);
  }
}

inline void add_values(const Codes& codes, Fetch& fetch, const Tables& tables, int channels, const ByteRows& rows,
                       Matrix& matrix, ValueRoom& room, float* out, int stride) {
  sum_values(codes, tables, channels, rows.of, rows.count, 0, matrix, room, fetch, out, stride);
  // low parts of both are too small to matter
  if (tables.is_fine()) sum_values(codes, tables, channels, rows.of, rows.high, 1, matrix, room, fetch, out, stride);
}

}  // namespace bitkv::BITKV_ISA
