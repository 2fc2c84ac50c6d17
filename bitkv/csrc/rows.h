// Rows of a page's codes times a few vectors, which is both halves of attention: scaled queries for keys,
// scaled probabilities for values.
//
// Scales never enter the inner loop: with k = s * code + z per channel,
//   sum_c x_c k_c = sum_c (x_c s_c) code_c + sum_c x_c z_c,
// so the vectors are scaled, rounded to a few bits and multiplied with the codes as bytes. What rounding
// costs is held against what quantization cost: `prepare` adds a second term where the first would
// exceed a fixed share of it.
//
// No include guard: each isa_*.cpp includes this once, after its simd header.

namespace bitkv::BITKV_ISA {

constexpr int kRows = 32;      // query rows that share a pass over a page
constexpr int kColumns = 256;  // channels of a head or tokens of a page, at most
constexpr int kMaxH = kAccumulators >= 16 ? 8 : 4;  // rows that are multiplied at once

// Calls fn(0), ..., fn(N - 1) with constants. Sums live in arrays, which stay in registers only where
// every index is a constant.
template <int N, class Fn>
[[gnu::always_inline]] inline void repeat(const Fn& fn) {
  [&]<int... i>(std::integer_sequence<int, i...>) { (fn(std::integral_constant<int, i>()), ...); }
  (std::make_integer_sequence<int, N>());
}

// Calls fn with the first of the rows to take next and their number, a constant: 8, 4, 2 or 1.
template <class Fn>
inline void by_rows(int rows, const Fn& fn) {
  int row = 0;
  if constexpr (kMaxH >= 8) for (; row + 8 <= rows; row += 8) fn(row, std::integral_constant<int, 8>());
  for (; row + 4 <= rows; row += 4) fn(row, std::integral_constant<int, 4>());
  if (row + 2 <= rows) { fn(row, std::integral_constant<int, 2>()); row += 2; }
  if (row < rows) fn(row, std::integral_constant<int, 1>());
}

// Into the second-level cache: a page and the next do not fit in the first together.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// A part with everything that would otherwise be divided out for each page.
struct Half {
  int bits, rows, columns, group, groups, blocks, vectors;
  bool row_scales, is_raw, tables, tail;
  DType dtype;
  size_t block_bytes, scales_at, zeros_at, tail_at, nbytes;

  explicit Half(const Part& p)
      : bits(p.bits), rows(p.rows), columns(p.columns), group(p.group),
        groups(p.is_raw() ? 1 : (p.row_scales ? p.columns : p.rows) / p.group), blocks(p.blocks()),
        vectors(p.is_raw() ? 0 : p.vectors()), row_scales(p.row_scales), is_raw(p.is_raw()), tables(p.has_tables()), tail(p.has_tail()),
        dtype(p.dtype), block_bytes(p.block_bytes()), scales_at(p.code_bytes()),
        zeros_at(p.code_bytes() + 2 * size_t(p.num_scales())), tail_at(p.blocks() * p.block_bytes()),
        nbytes(p.nbytes()) {}

  const uint16_t* scales(const uint8_t* data) const { return reinterpret_cast<const uint16_t*>(data + scales_at); }
  const uint16_t* zeros(const uint8_t* data) const { return reinterpret_cast<const uint16_t*>(data + zeros_at); }
};

// What rounding needs to know of rows of numbers times the scales of their columns.
struct Measured {
  float largest[kRows];  // of the numbers' sizes, or of their sums over four neighbours
  float square[kRows];   // sum of squares
  float offset[kRows];   // sum of the unscaled numbers times the middles of their columns' levels
};

// Keys' scales differ little from page to page, and so does the unit that suits a query: with the query
// in units of a guess, rounding takes one pass over it, and measuring serves to check the guess.
struct Guess {
  float* x;        // [rows][stride], in units
  float* inverse;  // 1 / unit of each row, 0 for none yet
};

struct Scratch {
  // numbers to multiply with codes: rows of bytes, a second term for what rounding left, and for
  // 1-bit codes their sums over each choice of four neighbours
  alignas(64) int8_t high[kMaxH][kColumns], low[kMaxH][kColumns];
  alignas(64) uint8_t tables[kMaxH][kColumns * 4];
  float unit[kMaxH], low_unit[kMaxH];      // what the numbers are multiples of
  float offset[kMaxH], low_offset[kMaxH];  // what turns sums of codes into sums of values
  Measured measured;
  bool has_low;
  alignas(64) float scaled[kMaxH][kColumns];
  alignas(64) float scores[kRows][kColumns], weights[kRows][kColumns];
};

// Rows of a result [h][stride], set or added to.
struct Result {
  float* data;
  int stride;
  bool add;

  Result from(int h) const { return {data + h * stride, stride, add}; }
  void put(int h, int block, F value) const {
    float* p = data + h * stride + block * kLanes;
    store(p, add ? load(p) + value : value);
  }
};

// --- numbers --------------------------------------------------------------------------------------

template <int H>
inline void sums_of(const F (&x)[H], float* out) {
  if constexpr (H % 4 == 0) {
    for (int i = 0; i < H; i += 4) sums({x[i], x[i + 1], x[i + 2], x[i + 3]}, out + i);
  } else {
    for (int i = 0; i < H; ++i) out[i] = sum(x[i]);
  }
}

template <int H>
inline void maxima_of(const F (&x)[H], float* out) {
  if constexpr (H % 4 == 0) {
    for (int i = 0; i < H; i += 4) maxima({x[i], x[i + 1], x[i + 2], x[i + 3]}, out + i);
  } else {
    for (int i = 0; i < H; ++i) out[i] = max(x[i]);
  }
}

// The scales of a row of columns; for numbers that are not scaled, none.
struct ColumnScales {
  const uint16_t* scale;
  const uint16_t* zero;
};

// How rows of numbers are rounded for codes of BITS bits: to bytes, or so that the sums of four
// neighbours are bytes of which two can be added. Probabilities are never negative: one bit more.
template <int BITS, bool kPositive, bool kTables, bool kOfRows = false>
struct Rounding {
  static constexpr float kTop = kTables ? (kPositive ? 125 : 61) : (kPositive ? 255 : 127);
  static constexpr float kLow = kTables ? 31 : 254;  // steps of the second term in a unit
  static constexpr int kBias = kTables && !kPositive ? 64 : 0;  // what makes sums of four unsigned
  static constexpr int kLowBias = kTables ? 64 : 0;
  static constexpr float kMiddle = float((1 << BITS) - 1) / 2;  // of the code range
  // 12 times the squared error of Gaussian data's codes, in steps
  static constexpr float kError = BITS == 1 ? 1.7f : BITS == 2 ? 1.3f : 1.0f;
  // of quantization's error that rounding may add; where rows have scales of their own, those of the rows
  // that matter may be far above the average
  static constexpr float kShare = kOfRows ? 0.03f : 0.09f;
  // Numbers that differ more in size than this make scores of which the softmax sees little else, and
  // there errors grow as quantization's no longer do.
  static constexpr float kSpread = kTables ? 9 : 5.5f;

  // Whether rounding to this unit may cost more than it should: its variance times that of codes around
  // their middle, against the square of what quantization did to the numbers.
  static bool is_coarse(float unit, float largest, int columns, int group, float square) {
    const float variance = BITS == 1 ? 0.25f : BITS == 2 ? 1.1f : group >= 128 ? 7.3f : 8.0f;
    const float of_error = unit * unit * variance / (kError * kShare * kShare);
    const float of_spread = kPositive ? 0 : largest * largest / (kSpread * kSpread);
    return float(columns) * std::max(of_error, of_spread) > square;
  }

  static constexpr bool kUnsigned = kPositive && !kTables;
  static constexpr bool kIsFine = BITS == 4;

  static F size(F y) {
    return kTables ? sums_of_fours(abs(y)) : abs(y);
  }
};

template <class Rule, int H>
inline void measure(const float* x, int stride, int columns, ColumnScales of, float* largest, float* square,
                    float* offset) {
  F top[H], squares[H], offsets[H];
  repeat<H>([&](auto h) { top[h] = squares[h] = offsets[h] = set(0); });
  for (int c = 0; c < columns; c += kLanes) {
    const F scale = of.scale ? load_half(of.scale + c) : set(1);
    const F middle = of.scale ? fma(scale, set(Rule::kMiddle), load_half(of.zero + c)) : set(1);
    repeat<H>([&](auto h) {
      const F xc = load(x + h * stride + c), y = xc * scale;
      top[h] = max(top[h], Rule::size(y));
      squares[h] = fma(y, y, squares[h]);
      offsets[h] = fma(xc, middle, offsets[h]);
    });
  }
  maxima_of<H>(top, largest);
  sums_of<H>(squares, square);
  sums_of<H>(offsets, offset);
}

// Sixteen columns at a time, or four times as many: fn(column, number of vectors as a constant).
template <class Fn>
[[gnu::always_inline]] inline void by_columns(int columns, const Fn& fn) {
  int c = 0;
  for (; c + 64 <= columns; c += 64) fn(c, std::integral_constant<int, 4>());
  for (; c < columns; c += kLanes) fn(c, std::integral_constant<int, 1>());
}

template <class Rule, int N>
[[gnu::always_inline]] inline I store_numbers(int8_t* p, const F (&y)[N], I counts) {
  if constexpr (N == 4) {
    const B bytes = pack<Rule::kUnsigned>(to_int(y[0]), to_int(y[1]), to_int(y[2]), to_int(y[3]));
    store_bytes(p, bytes);
    return count<Rule::kUnsigned>(counts, bytes);
  } else {
    const I n = to_int(y[0]);
    Rule::kUnsigned ? store_unsigned_bytes(p, n) : store_bytes(p, n);
    return counts + n;
  }
}

// What rounding left, where it matters: low = (y - round(y)) in smaller steps, y = x * scale in units.
template <class Rule, int H>
inline void round_rest(const float* x, int stride, int columns, const uint16_t* scale, const float* inverse,
                       Scratch& s) {
  for (int h = 0; h < H; ++h) {
    I counts = zero_int();
    for (int c = 0; c < columns; c += kLanes) {
      F y = load(x + h * stride + c) * set(inverse[h]);
      if (scale) y = y * load_half(scale + c);
      const I n = to_int((y - round(y)) * set(Rule::kLow));
      counts = counts + n;
      store_bytes(s.low[h] + c, n);
    }
    s.low_unit[h] = s.unit[h] / Rule::kLow;
    s.low_offset[h] = -s.low_unit[h] * (Rule::kMiddle * sum(to_float(counts)) + float(Rule::kLowBias * columns / 4));
  }
}

// Rounds H rows x, times their columns' scales if there are any, to multiples of each row's unit.
//
// The sums count codes from the middle of their range, so that the part all codes share is exact and
// rounding meets only the deviations.
template <class Rule, int H>
inline void round_rows(const float* x, int stride, int columns, int group, const uint16_t* scale, const float* largest,
                       const float* square, const float* offset, Scratch& s) {
  float inverse[H], total[H];
  I counts[H];
  repeat<H>([&](auto h) {
    inverse[h] = largest[h] > 1e-30f ? Rule::kTop / largest[h] : 0;
    s.unit[h] = largest[h] / Rule::kTop;
    counts[h] = zero_int();
  });
  by_columns(columns, [&](int c, auto n) {
    F scales[n()];
    repeat<n()>([&](auto j) { scales[j] = scale ? load_half(scale + c + j * kLanes) : set(1); });
    repeat<H>([&](auto h) {
      F y[n()];
      repeat<n()>([&](auto j) { y[j] = load(x + h * stride + c + j * kLanes) * (scales[j] * set(inverse[h])); });
      counts[h] = store_numbers<Rule, n()>(s.high[h] + c, y, counts[h]);
    });
  });
  F as_float[H];
  repeat<H>([&](auto h) { as_float[h] = to_float(counts[h]); });
  sums_of<H>(as_float, total);
  s.has_low = false;
  repeat<H>([&](auto h) {
    s.offset[h] = offset[h] - s.unit[h] * (Rule::kMiddle * total[h] + float(Rule::kBias * columns / 4));
    s.has_low |= Rule::is_coarse(s.unit[h], largest[h], columns, group, square[h]);
  });
  if (s.has_low) round_rest<Rule, H>(x, stride, columns, scale, inverse, s);
}

// The same in one pass over rows that are in units already; false if the units do not suit.
template <class Rule, int H>
inline bool round_by_guess(const float* x, int stride, int columns, int group, ColumnScales of, const float* inverse,
                           Scratch& s) {
  F top[H], squares[H], offsets[H];
  I counts[H];
  for (int h = 0; h < H; ++h) if (inverse[h] == 0) return false;
  repeat<H>([&](auto h) { top[h] = squares[h] = offsets[h] = set(0), counts[h] = zero_int(); });
  by_columns(columns, [&](int c, auto n) {
    F scales[n()], middles[n()];
    repeat<n()>([&](auto j) {
      scales[j] = load_half(of.scale + c + j * kLanes);
      middles[j] = fma(scales[j], set(Rule::kMiddle), load_half(of.zero + c + j * kLanes));
    });
    repeat<H>([&](auto h) {
      F y[n()];
      repeat<n()>([&](auto j) {
        const F xc = load(x + h * stride + c + j * kLanes);
        y[j] = xc * scales[j];
        top[h] = max(top[h], Rule::size(y[j]));
        squares[h] = fma(y[j], y[j], squares[h]);
        offsets[h] = fma(xc, middles[j], offsets[h]);
      });
      counts[h] = store_numbers<Rule, n()>(s.high[h] + c, y, counts[h]);
    });
  });
  float largest[H], square[H], offset[H], total[H];
  F as_float[H];
  maxima_of<H>(top, largest);
  repeat<H>([&](auto h) { as_float[h] = to_float(counts[h]); });
  sums_of<H>(squares, square);
  sums_of<H>(offsets, offset);
  sums_of<H>(as_float, total);
  bool suits = true;
  s.has_low = false;
  repeat<H>([&](auto h) {
    suits &= largest[h] <= Rule::kTop && largest[h] >= 0.5f * Rule::kTop;
    s.unit[h] = 1 / inverse[h];
    s.offset[h] = s.unit[h] * (offset[h] - Rule::kMiddle * total[h] - float(Rule::kBias * columns / 4));
    s.has_low |= Rule::is_coarse(1, largest[h], columns, group, square[h]);
  });
  if (suits && s.has_low) {
    float ones[H];
    for (float& one : ones) one = 1;
    round_rest<Rule, H>(x, stride, columns, of.scale, ones, s);
  }
  return suits;
}

template <class Rule, int H>
inline void round_keys(const float* x, int stride, int columns, int group, ColumnScales of, const Guess& guess,
                       int row, Scratch& s) {
  float* in_units = guess.x + row * stride;
  if (round_by_guess<Rule, H>(in_units, stride, columns, group, of, guess.inverse + row, s)) return;
  Measured& m = s.measured;
  measure<Rule, H>(x, stride, columns, of, m.largest, m.square, m.offset);
  round_rows<Rule, H>(x, stride, columns, group, of.scale, m.largest, m.square, m.offset, s);
  // room for larger scales to come: more of it where few tokens make a scale, less at 4 bits
  const float room = Rule::kIsFine ? 0.92f : group >= 128 ? 0.85f : 0.75f;
  for (int h = 0; h < H; ++h) {
    const float inverse = m.largest[h] > 1e-30f ? room * Rule::kTop / m.largest[h] : 0;
    guess.inverse[row + h] = inverse;
    for (int c = 0; c < columns; c += kLanes) {
      store(in_units + h * stride + c, load(x + h * stride + c) * set(inverse));
    }
  }
}

// --- codes times bytes ----------------------------------------------------------------------------

// acc[r][h] += codes of R blocks * numbers of H rows, over `vectors` vectors of a block.
template <int BITS, bool kPositive, int H, int R>
[[gnu::always_inline]] inline void multiply(I (&acc)[R][H], const uint8_t* codes, size_t block_bytes,
                                            int vectors, const int8_t* numbers, ptrdiff_t ahead) {
  constexpr uint8_t kMask = (1 << BITS) - 1;
  for (int v = 0; v < vectors; ++v) {
    B word[R];
    repeat<R>([&](auto r) {
      const uint8_t* p = codes + r * block_bytes + v * 64;
      word[r] = load_bytes(p);
      prefetch(p + ahead);
    });
#pragma GCC unroll 1
    for (int at = 0; at < 8 / BITS; ++at, numbers += 4) {
      B code[R];
      repeat<R>([&](auto r) {
        code[r] = bits_at(word[r], 0, kMask);
        word[r] = shifted<BITS>(word[r]);
      });
      repeat<H>([&](auto h) {
        int32_t four;
        __builtin_memcpy(&four, numbers + h * kColumns, 4);
        repeat<R>([&](auto r) {
          acc[r][h] = kPositive ? dot_unsigned(acc[r][h], code[r], four) : dot(acc[r][h], code[r], four);
        });
      });
    }
  }
}

// The sixteen columns that two neighbouring blocks of 1-bit codes keep in one vector.
template <int H>
[[gnu::always_inline]] inline void multiply_tail(I (&acc)[H], const Half& part, const uint8_t* data, int block,
                                                 const int8_t* numbers) {
  const B word = load_bytes(data + part.tail_at + (block / 2) * 64);
  for (int at = 0; at < 4; ++at) {
    const B code = bits_at(word, at + 4 * (block % 2), 1);
    repeat<H>([&](auto h) {
      int32_t four;
      __builtin_memcpy(&four, numbers + h * kColumns + (part.vectors * 8 + at) * 4, 4);
      acc[h] = dot(acc[h], code, four);
    });
  }
}

// Blocks [first, last), which share a row of scales, times H rows of numbers.
template <int BITS, bool kPositive, int H, int R>
inline void byte_sums(const Half& part, const uint8_t* data, int first, int last, const int8_t* numbers,
                      const float* unit, const float* offset, Result out, ptrdiff_t ahead) {
  int block = first;
  for (; block + R <= last; block += R) {
    I acc[R][H];
    repeat<R>([&](auto r) { repeat<H>([&](auto h) { acc[r][h] = zero_int(); }); });
    multiply<BITS, kPositive, H, R>(acc, data + block * part.block_bytes, part.block_bytes, part.vectors, numbers,
                                    ahead);
    if constexpr (BITS == 1 && !kPositive) {
      if (part.tail) repeat<R>([&](auto r) { multiply_tail<H>(acc[r], part, data, block + r, numbers); });
    }
    repeat<R>([&](auto r) {
      repeat<H>([&](auto h) { out.put(h, block + r, fma(to_float(acc[r][h]), set(unit[h]), set(offset[h]))); });
    });
  }
  if constexpr (R > 1) {
    if (block < last) byte_sums<BITS, kPositive, H, R / 2>(part, data, block, last, numbers, unit, offset, out, ahead);
  }
}

constexpr int blocks_at_once(int h, int most) { return std::max(1, std::min(most, kAccumulators / h)); }

// --- 1-bit codes by table -------------------------------------------------------------------------

// The sums of every choice of four neighbouring numbers, plus `bias`: sixteen bytes for each four columns.
inline void fill_tables(const int8_t* numbers, int columns, int bias, uint8_t* tables) {
  for (int c = 0; c < columns; c += kLanes) choices_of_four(numbers + c, bias, tables + 4 * c);
}

// Blocks of 64 rows [first, last): a byte of codes selects from two tables, for eight columns at once.
template <int H, int R>
inline void table_sums(const Half& part, const uint8_t* data, int first, int last, const uint8_t (*tables)[kColumns * 4],
                       const float* unit, const float* offset, Result out, ptrdiff_t ahead) {
  int block = first;
  for (; block + R <= last; block += R) {
    W acc[R][H];
    repeat<R>([&](auto r) { repeat<H>([&](auto h) { acc[r][h] = zero_words(); }); });
    const uint8_t* codes = data + block * part.columns * 8;
    const uint8_t* table = tables[0];
    for (int c = 0; c < part.columns; c += 8, codes += 64, table += 32) {
      B low[R], high[R];
      repeat<R>([&](auto r) {
        const uint8_t* p = codes + r * part.columns * 8;
        const B word = load_bytes(p);
        prefetch(p + ahead);
        low[r] = bits_at(word, 0, 15);
        high[r] = bits_at(word, 4, 15);
      });
      repeat<H>([&](auto h) {
        const B first_four = load_table(table + h * kColumns * 4), last_four = load_table(table + h * kColumns * 4 + 16);
        repeat<R>([&](auto r) {
          acc[r][h] = add_pairs(acc[r][h], add_bytes(lookup(first_four, low[r]), lookup(last_four, high[r])));
        });
      });
    }
    repeat<R>([&](auto r) {
      repeat<H>([&](auto h) {
        I rows[4];
        separate(acc[r][h], rows);
        repeat<4>([&](auto i) {
          out.put(h, 4 * (block + r) + i, fma(to_float(rows[i]), set(unit[h]), set(offset[h])));
        });
      });
    });
  }
  if constexpr (R > 1) {
    if (block < last) table_sums<H, R / 2>(part, data, block, last, tables, unit, offset, out, ahead);
  }
}

// --- a part of a page -----------------------------------------------------------------------------

inline void prefetch_scales(const uint16_t* scale, const uint16_t* zero, int count, ptrdiff_t ahead) {
  for (int c = 0; c < count; c += 32) {
    prefetch(reinterpret_cast<const uint8_t*>(scale + c) + ahead);
    prefetch(reinterpret_cast<const uint8_t*>(zero + c) + ahead);
  }
}

// Scales of the columns: per-channel keys (groups of tokens), values (groups of channels). With `measured`,
// x is scaled already.
template <int BITS, bool kPositive, bool kTables>
inline void codes_by_column(const Half& part, const uint8_t* data, const float* x, int stride, int rows,
                            const Guess& guess, const Measured* measured, Result out, ptrdiff_t ahead, Scratch& s) {
  using Rule = Rounding<BITS, kPositive, kTables>;
  constexpr int kBlock = kTables ? 64 : kLanes;
  const int blocks = part.group / kBlock;
  for (int g = 0; g < part.groups; ++g) {
    const ColumnScales of{part.scales(data) + g * part.columns, part.zeros(data) + g * part.columns};
    prefetch_scales(of.scale, of.zero, part.columns, ahead);
    const int first = g * blocks, last = first + blocks;
    by_rows(rows, [&](int row, auto h) {
      constexpr int H = h();
      const float* xr = x + row * stride;
      if constexpr (!kPositive) {
        round_keys<Rule, H>(xr, stride, part.columns, part.group, of, guess, row, s);
      } else if (measured) {
        round_rows<Rule, H>(xr, stride, part.columns, part.group, nullptr, measured->largest + row, measured->square + row,
                            measured->offset + row, s);
      } else {
        Measured& m = s.measured;
        measure<Rule, H>(xr, stride, part.columns, of, m.largest, m.square, m.offset);
        round_rows<Rule, H>(xr, stride, part.columns, part.group, of.scale, m.largest, m.square, m.offset, s);
      }
      Result to = out.from(row);
      if constexpr (kTables) {
        constexpr int R = blocks_at_once(2 * H, 2);
        for (int i = 0; i < H; ++i) fill_tables(s.high[i], part.columns, Rule::kBias, s.tables[i]);
        table_sums<H, R>(part, data, first, last, s.tables, s.unit, s.offset, to, ahead);
        if (!s.has_low) return;
        to.add = true;
        for (int i = 0; i < H; ++i) fill_tables(s.low[i], part.columns, Rule::kLowBias, s.tables[i]);
        table_sums<H, R>(part, data, first, last, s.tables, s.low_unit, s.low_offset, to, ahead);
      } else {
        constexpr int R = blocks_at_once(H, 4);
        byte_sums<BITS, kPositive, H, R>(part, data, first, last, s.high[0], s.unit, s.offset, to, ahead);
        if (!s.has_low) return;
        to.add = true;
        byte_sums<BITS, false, H, R>(part, data, first, last, s.low[0], s.low_unit, s.low_offset, to, ahead);
      }
    });
  }
}

// Scales of the rows: per-token keys (groups of channels).
template <int BITS>
inline void codes_by_row(const Half& part, const uint8_t* data, const float* x, int stride, int rows, Result out,
                         ptrdiff_t ahead, Scratch& s) {
  using Rule = Rounding<BITS, false, false, true>;
  const int vectors = part.group * BITS / 32;
  for (int g = 0; g < part.groups; ++g) {
    const uint16_t* scale = part.scales(data) + g * part.rows;
    const uint16_t* zero = part.zeros(data) + g * part.rows;
    prefetch_scales(scale, zero, part.rows, ahead);
    by_rows(rows, [&](int row, auto h) {
      constexpr int H = h();
      const float* xg = x + row * stride + g * part.group;
      Measured& m = s.measured;
      measure<Rule, H>(xg, stride, part.group, {nullptr, nullptr}, m.largest, m.square, m.offset);
      round_rows<Rule, H>(xg, stride, part.group, part.group, nullptr, m.largest, m.square, m.offset, s);
      const float* total = m.offset;  // without scales, the sum of x
      Result to = out.from(row);
      to.add |= g > 0;
      for (int block = 0; block < part.blocks; ++block) {
        I high[1][H], low[1][H];
        repeat<H>([&](auto i) { high[0][i] = low[0][i] = zero_int(); });
        const uint8_t* codes = data + block * part.block_bytes + g * vectors * 64;
        multiply<BITS, false, H, 1>(high, codes, 0, vectors, s.high[0], ahead);
        if (s.has_low) multiply<BITS, false, H, 1>(low, codes, 0, vectors, s.low[0], ahead);
        if (BITS == 1 && part.tail) {
          multiply_tail<H>(high[0], part, data, block, s.high[0]);
          if (s.has_low) multiply_tail<H>(low[0], part, data, block, s.low[0]);
        }
        const F sc = load_half(scale + block * kLanes);
        const F middle = fma(sc, set(Rule::kMiddle), load_half(zero + block * kLanes));
        repeat<H>([&](auto i) {
          // the codes' deviations from the middle of their range times x, then that middle times x
          F deviation = fma(to_float(high[0][i]), set(s.unit[i]), set(s.offset[i] - total[i]));
          if (s.has_low) deviation = deviation + fma(to_float(low[0][i]), set(s.low_unit[i]), set(s.low_offset[i]));
          to.put(i, block, fma(sc, deviation, middle * set(total[i])));
        });
      }
    });
  }
}

// --- rows of numbers that need float32 ------------------------------------------------------------

// Blocks of 8-bit codes or unquantized values as float32, column by column; fn(column, values of R blocks).
template <int R, class Fn>
[[gnu::always_inline]] inline void each_column(const Half& part, const uint8_t* data, int block, int first, int last, ptrdiff_t ahead,
                        const Fn& fn) {
  const uint8_t* p = data + block * part.block_bytes;
  F value[R];
  if (part.bits == 8) {
    for (int c = first; c < last; c += 4) {
      B word[R];
      repeat<R>([&](auto r) {
        const uint8_t* at = p + r * part.block_bytes + c * kLanes;
        word[r] = load_bytes(at);
        prefetch(at + ahead);
      });
      repeat<4>([&](auto k) {
        repeat<R>([&](auto r) { value[r] = byte_to_float(word[r], k); });
        fn(c + k, value);
      });
    }
  } else {
    const int size = part.bits / 8;
    for (int c = first; c < last; ++c) {
      repeat<R>([&](auto r) {
        const uint8_t* at = p + r * part.block_bytes + c * kLanes * size;
        prefetch(at + ahead);
        value[r] = size == 4 ? load(reinterpret_cast<const float*>(at))
                             : load(reinterpret_cast<const uint16_t*>(at), part.dtype);
      });
      fn(c, value);
    }
  }
}

// out[h][rows of the blocks] (+)= sum over columns [first, last) of y[h][column] * value, plus offset[h]
template <int H, int R>
inline void float_sums(const Half& part, const uint8_t* data, int block, int blocks_end, int first, int last,
                       const float* y, int stride, const float* offset, const uint16_t* row_scale,
                       const uint16_t* row_zero, Result out, ptrdiff_t ahead) {
  for (; block + R <= blocks_end; block += R) {
    F acc[R][H];
    repeat<R>([&](auto r) { repeat<H>([&](auto h) { acc[r][h] = set(0); }); });
    each_column<R>(part, data, block, first, last, ahead, [&](int c, const F (&value)[R]) {
      repeat<H>([&](auto h) {
        const F yc = set(y[h * stride + c]);
        repeat<R>([&](auto r) { acc[r][h] = fma(value[r], yc, acc[r][h]); });
      });
    });
    repeat<R>([&](auto r) {
      repeat<H>([&](auto h) {
        F value = acc[r][h] + set(offset[h]);
        if (row_scale) {
          const int rows = (block + r) * kLanes;
          const F zero = load_half(row_zero + rows);
          value = fma(acc[r][h], load_half(row_scale + rows), zero * set(offset[h]));
        }
        out.put(h, block + r, value);
      });
    });
  }
  if constexpr (R > 1) {
    if (block < blocks_end) {
      float_sums<H, R / 2>(part, data, block, blocks_end, first, last, y, stride, offset, row_scale, row_zero, out,
                           ahead);
    }
  }
}

constexpr int float_blocks(int h) { return kAccumulators >= 16 ? (h >= 8 ? 1 : 2) : 1; }

inline void eight_bits_by_column(const Half& part, const uint8_t* data, const float* x, int stride, int rows,
                                 Result out, ptrdiff_t ahead, Scratch& s) {
  const int blocks = part.group / kLanes;
  for (int g = 0; g < part.groups; ++g) {
    const uint16_t* scale = part.scales(data) + g * part.columns;
    const uint16_t* zero = part.zeros(data) + g * part.columns;
    by_rows(rows, [&](int row, auto h) {
      constexpr int H = h();
      F offset[H];
      repeat<H>([&](auto i) { offset[i] = set(0); });
      for (int c = 0; c < part.columns; c += kLanes) {
        const F sc = load_half(scale + c), z = load_half(zero + c);
        repeat<H>([&](auto i) {
          const F xc = load(x + (row + i) * stride + c);
          store(s.scaled[i] + c, xc * sc);
          offset[i] = fma(xc, z, offset[i]);
        });
      }
      sums_of<H>(offset, s.offset);
      float_sums<H, float_blocks(H)>(part, data, g * blocks, (g + 1) * blocks, 0, part.columns, s.scaled[0], kColumns,
                                     s.offset, nullptr, nullptr, out.from(row), ahead);
    });
  }
}

inline void eight_bits_by_row(const Half& part, const uint8_t* data, const float* x, int stride, int rows,
                              Result out, ptrdiff_t ahead) {
  for (int g = 0; g < part.groups; ++g) {
    const int first = g * part.group, last = first + part.group;
    float total[kRows];
    for (int i = 0; i < rows; ++i) {
      F sum_x = set(0);
      for (int c = first; c < last; c += kLanes) sum_x = sum_x + load(x + i * stride + c);
      total[i] = sum(sum_x);
    }
    Result to = out;
    to.add |= g > 0;
    by_rows(rows, [&](int row, auto h) {
      float_sums<h(), float_blocks(h())>(part, data, 0, part.blocks, first, last, x + row * stride, stride,
                                         total + row, part.scales(data) + g * part.rows,
                                         part.zeros(data) + g * part.rows, to.from(row), ahead);
    });
  }
}

inline void unquantized(const Half& part, const uint8_t* data, const float* x, int stride, int rows, Result out,
                        ptrdiff_t ahead) {
  constexpr float kNone[kRows] = {};
  by_rows(rows, [&](int row, auto h) {
    float_sums<h(), float_blocks(h())>(part, data, 0, part.blocks, 0, part.columns, x + row * stride, stride, kNone,
                                       nullptr, nullptr, out.from(row), ahead);
  });
}

// out[i][row] (+)= sum over columns of x[i][column] * value[row][column], for one half of a page.
// `ahead` is the distance to the page that comes next, which is fetched meanwhile: the hardware
// does not look beyond 4 KB.
inline void keys_times(const Half& part, const uint8_t* data, const float* x, int stride, int rows, const Guess& guess,
                       Result out, ptrdiff_t ahead, Scratch& s) {
  const auto by_column = [&](auto bits, auto tables) {
    codes_by_column<bits(), false, tables()>(part, data, x, stride, rows, guess, nullptr, out, ahead, s);
  };
  if (part.is_raw) return unquantized(part, data, x, stride, rows, out, ahead);
  if (part.tables) return by_column(std::integral_constant<int, 1>(), std::true_type());
  switch (part.row_scales ? -part.bits : part.bits) {
    case 1: return by_column(std::integral_constant<int, 1>(), std::false_type());
    case 2: return by_column(std::integral_constant<int, 2>(), std::false_type());
    case 4: return by_column(std::integral_constant<int, 4>(), std::false_type());
    case 8: return eight_bits_by_column(part, data, x, stride, rows, out, ahead, s);
    case -1: return codes_by_row<1>(part, data, x, stride, rows, out, ahead, s);
    case -2: return codes_by_row<2>(part, data, x, stride, rows, out, ahead, s);
    case -4: return codes_by_row<4>(part, data, x, stride, rows, out, ahead, s);
    default: return eight_bits_by_row(part, data, x, stride, rows, out, ahead);
  }
}

inline void values_times(const Half& part, const uint8_t* data, const float* x, int stride, int rows,
                         const Measured* measured, Result out, ptrdiff_t ahead, Scratch& s) {
  const auto by_column = [&](auto bits, auto tables) {
    codes_by_column<bits(), true, tables()>(part, data, x, stride, rows, {}, measured, out, ahead, s);
  };
  if (part.is_raw) return unquantized(part, data, x, stride, rows, out, ahead);
  if (part.tables) return by_column(std::integral_constant<int, 1>(), std::true_type());
  switch (part.bits) {
    case 1: return by_column(std::integral_constant<int, 1>(), std::false_type());
    case 2: return by_column(std::integral_constant<int, 2>(), std::false_type());
    case 4: return by_column(std::integral_constant<int, 4>(), std::false_type());
    default: return eight_bits_by_column(part, data, x, stride, rows, out, ahead, s);
  }
}

}  // namespace bitkv::BITKV_ISA
