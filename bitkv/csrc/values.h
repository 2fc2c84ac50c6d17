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

// What a tile's values are added up from, and where to.
struct ValueSums {
  const Codes& codes;
  const Tables& tables;
  int channels;  // that share a code
  float* out;    // [query rows][stride]
  int stride;
  Fetch& fetch;
  int part = 0;  // 1 for the entries' low parts

  const uint8_t* table(int c) const { return tables.of(c) + part * tables.low(); }
  Index index(int v, int c) const { return Index(load_v(codes.from[v] + c / channels * codes.stride)); }

  // Sums of sixteen channels from c on, for a row of bytes.
  void add(const ByteRow& row, int c, V sums) const {
    float* to = out + row.row * stride + c;
    const F unit = load(tables.units() + c) * set(row.unit * (part ? 1 : 256));
    store(to, fma(to_float(I{sums}), unit, load(to)));
  }
};

// Calls fn(how many neighbouring channels share a code, as a constant: up to kMost).
template <int kMost, class Fn>
inline void by_sharing(int channels, const Fn& fn) {
  if (kMost == 8 && channels % 8 == 0) fn(std::integral_constant<int, 8>());
  else if (kMost == 8 && channels % 4 == 0) fn(std::integral_constant<int, 4>());
  else if (channels % 2 == 0) fn(std::integral_constant<int, 2>());
  else fn(std::integral_constant<int, 1>());
}

// --- without the matrix unit ----------------------------------------------------------------------

// Rows of a tile's bytes.
struct PlainValues { alignas(64) uint8_t bytes[4][kTile]; };

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

// acc[h][c] = entries of C neighbouring channels from `at` on times H rows of bytes.
template <int C, int H>
[[gnu::always_inline]] inline void multiply_values(const ValueSums& sums, int at, const uint8_t (*bytes)[kTile], V (*out)[kLanes]) {
  const uint8_t* table = sums.table(at);
  V acc[C][H];
  repeat<C>([&](auto c) { repeat<H>([&](auto h) { acc[c][h] = _mm512_setzero_si512(); }); });
  for (int v = 0; v < sums.codes.vectors; ++v) {
    const Index index = sums.index(v, at);
    V weight[H];
    repeat<H>([&](auto h) { weight[h] = load_v(bytes[h] + v * kVector); });
    repeat<C>([&](auto c) {
      const V entry = index.look_up(table + c * kEntries);
      repeat<H>([&](auto h) { acc[c][h] = dot_bytes(acc[c][h], weight[h], entry); });
    });
  }
  repeat<C>([&](auto c) { repeat<H>([&](auto h) { out[h][c] = acc[c][h]; }); });
}

// Adds up all channels for H rows of bytes, C at a time.
template <int C, int H>
[[gnu::noinline]] void scan_values(const ValueSums sums, const ByteRow* rows, PlainValues& room) {
  const int vectors = sums.codes.vectors;
  for (int h = 0; h < H; ++h) {
    for (int v = 0; v < vectors; ++v) _mm512_store_si512(room.bytes[h] + v * kVector, rows[h].at(v * kVector));
  }
  V acc[H][kLanes];
  for (int c = 0; c < sums.tables.width; c += kLanes) {
    for (int i = 0; i < kLanes; i += C) {
      sums.fetch.steps(vectors);
      multiply_values<C, H>(sums, c + i, room.bytes, reinterpret_cast<V(*)[kLanes]>(&acc[0][i]));
    }
    for (int h = 0; h < H; ++h) sums.add(rows[h], c, sums_of_sixteen(acc[h]));
  }
}

inline void sum_values(const ValueSums& sums, const ByteRow* rows, int count, Matrix&, PlainValues& room) {
  by_sharing<2>(sums.channels, [&](auto n) {
    by_four_rows(count, [&](int row, auto h) { scan_values<n(), h()>(sums, rows + row, room); });
  });
}

// --- by the matrix unit ---------------------------------------------------------------------------

constexpr int kMatrixBlocks = 4;  // of sixteen channels that share loads of weights

// What the matrix unit is given: a block's entries and those of the block before it, and weights in quads of tokens,
// `columns` rows in each. And what it gives.
struct MatrixValues {
  alignas(64) uint8_t entries[2][kMatrixRows][kMatrixBytes];
  alignas(64) int32_t weights[kTileVectors * kMatrixRows * kMatrixRows];
  alignas(64) int32_t sums[kMatrixBlocks][kMatrixRows * kMatrixRows];
};

// Quarters of a register that lie `stride` numbers apart.
inline V load_quarters(const int32_t* p, int stride) {
  if (stride == 4) return load_v(p);
  const auto quarter = [&](int l) { return _mm_load_si128(reinterpret_cast<const __m128i*>(p + l * stride)); };
  const V x = _mm512_mask_broadcast_i32x4(_mm512_broadcast_i32x4(quarter(0)), 0x00f0, quarter(1));
  return _mm512_mask_broadcast_i32x4(_mm512_mask_broadcast_i32x4(x, 0x0f00, quarter(2)), 0xf000, quarter(3));
}
inline void store_quarters(V x, int32_t* p, int stride) {
  if (stride == 4) return _mm512_storeu_si512(p, x);
  repeat<4>([&](auto l) {
    _mm_store_si128(reinterpret_cast<__m128i*>(p + l * stride), _mm512_extracti32x4_epi32(x, decltype(l)::value));
  });
}

// Quads where they are transposed to their order: dword 4 i + l is at 4 l + i, or comes from there.
inline V in_order(V x) {
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), x);
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

// Sums of rows from what the unit stored of sixteen channels from c on.
inline void add_block(const ValueSums& sums, const ByteRow* rows, int count, int columns, int c, const int32_t* stored) {
  for (int h = 0; h < count; h += 4) {
    V x[4], of_row[4];  // quarter l of input i: channel 4 i + l in four rows
    repeat<4>([&](auto i) { x[i] = load_quarters(stored + 4 * i * columns + h, columns); });
    transpose_dwords(x, of_row);
    for (int i = 0; i < std::min(4, count - h); ++i) sums.add(rows[h + i], c, in_order(of_row[i]));
  }
}

// Entries of vector v in sixteen channels from c on, C at a time.
template <int C>
[[gnu::always_inline]] inline void put_entries(const ValueSums& sums, int v, int c, uint8_t (*to)[kMatrixBytes]) {
  const uint8_t* table = sums.table(c);
  for (int i = 0; i < kMatrixRows; i += C) {
    const Index index = sums.index(v, c + i);
    repeat<C>([&](auto j) { _mm512_store_si512(to[i + j], index.look_up(table + (i + j) * kEntries)); });
  }
}

// Sums of N blocks of channels from c on. A block is multiplied when the next one has been looked up, and what was stored
// is in the cache. Loading weights again for every block would take as long as multiplying. `sums` is a copy, which no store
// can change, so that its fields are not read again after each.
template <int C, int N>
[[gnu::noinline]] void sum_blocks(const ValueSums sums, int c, int columns, MatrixValues& room) {
  repeat<N>([&](auto b) { Matrix::zero<b()>(); });
  const auto multiply = [&](auto b, int at) __attribute__((always_inline)) {
    Matrix::load<5>(room.entries[at % 2], kMatrixBytes);
    Matrix::dot<b(), 5, 6>();
  };
  constexpr std::integral_constant<int, N - 1> kLast;
  for (int v = 0; v < sums.codes.vectors; ++v) {
    repeat<N>([&](auto b) __attribute__((always_inline)) {
      const int at = v * N + b();
      sums.fetch.steps(kMatrixRows / 2);
      put_entries<C>(sums, v, c + b() * kMatrixRows, room.entries[at % 2]);
      if constexpr (b() > 0) multiply(std::integral_constant<int, b() - 1>(), at - 1);
      else if (v > 0) multiply(kLast, at - 1);
      if constexpr (b() == 0) Matrix::load<6>(room.weights + v * kMatrixRows * columns, columns * 4);
    });
  }
  multiply(kLast, sums.codes.vectors * N - 1);
  repeat<N>([&](auto b) { Matrix::store<b()>(room.sums[b()], columns * 4); });
}

// As without the matrix unit.
inline void sum_values(const ValueSums& sums, const ByteRow* all, int count_all, Matrix& matrix, MatrixValues& room) {
  for (int row = 0; row < count_all; row += kMatrixRows) {
    const ByteRow* rows = all + row;
    const int count = std::min(kMatrixRows, count_all - row), columns = (count + 3) / 4 * 4;
    matrix.shape_values(columns);
    put_weights_in_quads(rows, count, columns, sums.codes.vectors, room.weights);
    for (int c = 0, blocks; c < sums.tables.width; c += blocks * kMatrixRows) {
      blocks = c + kMatrixBlocks * kMatrixRows <= sums.tables.width ? kMatrixBlocks : 1;
      by_sharing<8>(sums.channels, [&](auto n) {
        if (blocks == 1) sum_blocks<n(), 1>(sums, c, columns, room);
        else sum_blocks<n(), kMatrixBlocks>(sums, c, columns, room);
      });
      for (int b = 0; b < blocks; ++b) add_block(sums, rows, count, columns, c + b * kMatrixRows, room.sums[b]);
    }
  }
}

// --- either way -----------------------------------------------------------------------------------

using ValueRoom = std::conditional_t<kHasMatrix, MatrixValues, PlainValues>;

inline void add_values(ValueSums& sums, const ByteRows& rows, Matrix& matrix, ValueRoom& room) {
  sum_values(sums, rows.of, rows.count, matrix, room);
  sums.part = 1;  // low parts of both are too small to matter
  if (sums.tables.is_fine()) sum_values(sums, rows.of, rows.high, matrix, room);
}

}  // namespace bitkv::BITKV_ISA
