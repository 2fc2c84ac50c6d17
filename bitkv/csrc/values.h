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

// Bytes of a row of weights in steps of largest / 255.
inline void put_weights(const float* weights, int tokens, float largest, uint8_t* out) {
  const F inverse = set(largest > 1e-30f ? 255 / largest : 0);
  for (int t = 0; t < tokens; t += kVector) {
    I y[4];
    repeat<4>([&](auto i) { y[i] = to_int(load(weights + t + i * kLanes) * inverse); });
    store_bytes(out + t, pack<true>(y[0], y[1], y[2], y[3]));
  }
}

// In steps of largest / 65280, their high or their low bytes.
inline void put_half_weights(const float* weights, int tokens, float largest, int shift, uint8_t* out) {
  const F inverse = set(largest > 1e-30f ? 65280 / largest : 0);
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
    if (!unit.is_coarse) {
      put_weights(from, tokens, unit.largest, out.bytes[i]);
      continue;
    }
    put_half_weights(from, tokens, unit.largest, 8, out.bytes[i]);
    out.row[out.count] = i, out.unit[out.count] = unit.largest / 65280;
    put_half_weights(from, tokens, unit.largest, 0, out.bytes[out.count++]);
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
  if (kMost == 4 && channels % 4 == 0) fn(std::integral_constant<int, 4>());
  else if (channels % 2 == 0) fn(std::integral_constant<int, 2>());
  else fn(std::integral_constant<int, 1>());
}

// Sums of H rows of bytes over all channels, C at a time, into out[row of the bytes]. `part`: 1 for the entries' low parts.
template <int C, int H>
[[gnu::noinline]] void scan_values(const Codes& codes, const Tables& tables, int channels, const ByteRows& rows, int row,
                                   int part, Fetch& fetch, float* out, int stride) {
  V acc[H][kLanes];
  for (int c = 0; c < tables.width; c += kLanes) {
    for (int i = 0; i < kLanes; i += C) {
      fetch.steps(codes.vectors);
      multiply_values<C, H>(codes, tables.of(c + i) + part * tables.low(), (c + i) / channels * codes.stride, rows.bytes + row,
                            reinterpret_cast<V(*)[kLanes]>(&acc[0][i]));
    }
    for (int h = 0; h < H; ++h) {
      float* sums = out + rows.row[row + h] * stride + c;
      const F unit = load(tables.units() + c) * set(rows.unit[row + h] * (part ? 1 : 256));
      store(sums, fma(to_float(I{sums_of_sixteen(acc[h])}), unit, load(sums)));
    }
  }
}

// What the matrix unit is given: entries of sixteen channels, and weights in quads of tokens, `columns` rows in each.
constexpr int kMatrixVectors = 4;  // whose entries stay in the first-level cache until they are multiplied
struct MatrixValues {
  alignas(64) uint8_t entries[kMatrixVectors][kMatrixRows][kMatrixBytes];
  alignas(64) uint8_t weights[kTileVectors * kMatrixRows * kMatrixBytes];
  alignas(64) int32_t sums[kWidth * kMatrixRows];
};

// Bytes of rows, four at a time, as the matrix unit wants them; those beyond the last are never looked at.
inline void put_weights_in_quads(const uint8_t (*bytes)[kTile], int columns, int vectors, uint8_t* out) {
  for (int v = 0; v < vectors; ++v) {
    for (int h = 0; h < columns; h += 4) {
      V x[4];
      repeat<4>([&](auto i) { x[i] = load_v(bytes[h + i] + v * kVector); });
      const V low[2] = {_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpacklo_epi32(x[2], x[3])};
      const V high[2] = {_mm512_unpackhi_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[2], x[3])};
      // register i has, in quarter l, quad 4 l + i of four rows
      const V quads[4] = {_mm512_unpacklo_epi64(low[0], low[1]), _mm512_unpackhi_epi64(low[0], low[1]),
                          _mm512_unpacklo_epi64(high[0], high[1]), _mm512_unpackhi_epi64(high[0], high[1])};
      repeat<4>([&](auto i) {
        repeat<4>([&](auto l) {
          uint8_t* to = out + ((v * kMatrixRows + 4 * l + i) * columns + h) * 4;
          _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm512_extracti32x4_epi32(quads[i], decltype(l)::value));
        });
      });
    }
  }
}

// Entries of sixteen channels, C at a time, of vectors [first, last). `part`: 1 for the low parts.
template <int C>
[[gnu::noinline]] void put_entries(const Codes& codes, const Tables& tables, int channels, int c, int part, int first, int last,
                                   uint8_t (*to)[kMatrixRows][kMatrixBytes]) {
  for (int i = 0; i < kMatrixRows; i += C) {
    const uint8_t* table = tables.of(c + i) + part * tables.low();
    const size_t at = (c + i) / channels * codes.stride;
    const auto of = [&]<int... j>(std::integer_sequence<int, j...>) {
      return std::array<ByteTable, C>{ByteTable(table + j * kEntries)...};
    }(std::make_integer_sequence<int, C>());
    for (int v = first; v < last; ++v) {
      const Index index(load_v(codes.from[v] + at));
      repeat<C>([&](auto j) { _mm512_store_si512(to[v - first][i + j], index.look_up(of[j])); });
    }
  }
}

// As scan_values, for up to sixteen rows of bytes, by the matrix unit.
[[gnu::noinline]] inline void sum_values_by_matrix(const Codes& codes, const Tables& tables, int channels, const ByteRows& rows,
                                                   int row, int count, int part, Matrix& matrix, MatrixValues& room,
                                                   Fetch& fetch, float* out, int stride) {
  const int columns = (count + 3) / 4 * 4;
  matrix.shape_columns(columns);
  put_weights_in_quads(rows.bytes + row, columns, codes.vectors, room.weights);
  const V channel = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const V at = _mm512_mullo_epi32(channel, _mm512_set1_epi32(columns));
  for (int c = 0; c < tables.width; c += kMatrixRows) {
    Matrix::zero<7>();
    for (int first = 0; first < codes.vectors; first += kMatrixVectors) {
      const int last = std::min(first + kMatrixVectors, codes.vectors);
      fetch.steps((last - first) * kMatrixRows / 2);
      by_sharing<4>(channels, [&](auto n) { put_entries<n()>(codes, tables, channels, c, part, first, last, room.entries); });
      for (int v = first; v < last; ++v) {
        Matrix::load<5>(room.entries[v - first], kMatrixBytes);
        Matrix::load<6>(room.weights + v * kMatrixRows * columns * 4, columns * 4);
        Matrix::dot<7, 5, 6>();
      }
    }
    Matrix::store<7>(room.sums + c * columns, columns * 4);
  }
  for (int h = 0; h < count; ++h) {
    float* sums = out + rows.row[row + h] * stride;
    const F unit = set(rows.unit[row + h] * (part ? 1 : 256));
    for (int c = 0; c < tables.width; c += kLanes) {
      const F of = to_float(I{_mm512_i32gather_epi32(at, room.sums + c * columns + h, 4)});
      store(sums + c, fma(of, unit * load(tables.units() + c), load(sums + c)));
    }
  }
}

inline void add_values(const Codes& codes, Fetch& fetch, const Tables& tables, int channels, const ByteRows& rows,
                       Matrix& matrix, MatrixValues& room, float* out, int stride) {
  for (int part = 0; part < (tables.is_fine() ? 2 : 1); ++part) {
    const int count = part ? rows.high : rows.count;  // low parts of both are too small to matter
    int row = 0;
    for (int n; kHasMatrix && count - row >= kMatrixLeast; row += n) {
      n = std::min(kMatrixRows, count - row);
      sum_values_by_matrix(codes, tables, channels, rows, row, n, part, matrix, room, fetch, out, stride);
    }
    by_sharing<2>(channels, [&](auto n) {
      const auto scan = [&](auto h) {
        scan_values<n(), h()>(codes, tables, channels, rows, row, part, fetch, out, stride);
        row += h();
      };
      while (row + 4 <= count) scan(std::integral_constant<int, 4>());
      if (row + 2 <= count) scan(std::integral_constant<int, 2>());
      if (row < count) scan(std::integral_constant<int, 1>());
    });
  }
}

}  // namespace bitkv::BITKV_ISA
