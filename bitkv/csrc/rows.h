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

#include "fetch.h"

namespace bitkv::BITKV_ISA {

constexpr int kRows = 32;      // query rows that share a pass over a page
constexpr int kColumns = 256;  // channels of a head or tokens of a page, at most
constexpr int kWidth = 512;    // numbers of a token that pages code, at most: a linear map may give more than channels
constexpr int kTokens = 128;   // tokens of a page, at most
constexpr int kTileTokens = 1024;        // whose scores are kept together, at most
constexpr int kTile = kTileTokens + 64;  // between rows of them: powers of two would share cache sets
constexpr int kUnitColumns = 64, kUnitBlocks = kColumns / kUnitColumns;  // where numbers have several units
constexpr int kNumbers = kColumns + 64;  // between rows of bytes: sixteen are stored with 48 zeros behind them
constexpr int kMaxH = kAccumulators >= 16 ? 8 : 4;  // rows that are multiplied at once

// Calls fn(0), ..., fn(N - 1) with constants. Sums live in arrays, which stay in registers only where
// every index is a constant.
template <int N, class Fn>
[[gnu::always_inline]] inline void repeat(const Fn& fn) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) { (fn(std::integral_constant<int, i>()), ...); }
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

// The scales of a row of columns.
struct ColumnScales {
  const uint16_t* scale;
  const uint16_t* zero;
};

// A part with everything that would otherwise be divided out for each page.
struct Half {
  int bits, rows, columns, group, groups, blocks, vectors;
  bool row_scales, is_raw, tables, tail;
  DType dtype;
  size_t block_bytes, scales_at, zeros_at, tail_at, nbytes;

  Half(const Part& p, bool lookups)
      : bits(p.bits), rows(p.rows), columns(p.columns), group(p.group),
        groups(p.is_raw() ? 1 : (p.row_scales ? p.columns : p.rows) / p.group), blocks(p.blocks()),
        vectors(p.is_raw() ? 0 : p.vectors()), row_scales(p.row_scales), is_raw(p.is_raw()), 
        // a table must serve 64 rows to be worth making
        tables(lookups && p.bits == 1 && !p.row_scales && p.group >= 64), tail(p.has_tail()),
        dtype(p.dtype), block_bytes(p.block_bytes()), scales_at(p.code_bytes()),
        zeros_at(p.code_bytes() + 2 * size_t(p.num_scales())), tail_at(p.blocks() * p.block_bytes()),
        nbytes(p.nbytes()) {}

  const uint16_t* scales(const uint8_t* data) const { return reinterpret_cast<const uint16_t*>(data + scales_at); }
  const uint16_t* zeros(const uint8_t* data) const { return reinterpret_cast<const uint16_t*>(data + zeros_at); }
  ColumnScales of_columns(const uint8_t* data, int g) const { return {scales(data) + g * columns, zeros(data) + g * columns}; }
  // whether sums over its columns are those of integers
  bool is_integer() const { return !is_raw && bits < 8; }
  // how often the loops over its codes, for up to kMaxH rows, and what lies between them ask for more to be fetched
  int steps() const { return int(scales_at / 64); }
  int pauses() const { return is_integer() ? groups + 1 : 0; }
};

// Rows of numbers are rounded to multiples of a unit, one for each block of a row's columns.
struct Units {
  float unit[kUnitBlocks][kRows], inverse[kUnitBlocks][kRows];
  bool is_coarse[kRows];  // whether what rounding leaves matters
};

// Rows of numbers to multiply with codes: bytes, and a second term for what rounding left.
struct Numbers {
  alignas(64) int8_t high[kMaxH][kNumbers], low[kMaxH][kNumbers];
  float unit[kUnitBlocks][kMaxH], low_unit[kUnitBlocks][kMaxH];  // what the bytes are multiples of
  float offset[kMaxH], low_offset[kMaxH];                       // what turns sums of codes into sums of values
};

struct Scratch {
  Numbers numbers;
  alignas(64) uint8_t tables[kMaxH][kColumns * 4];  // for 1-bit codes: the sums of each choice of a quad
  Units of_weights, of_queries;
  alignas(64) float x[kRows][kColumns], out[kRows][kWidth];
  alignas(64) float scaled[kMaxH][kColumns];
  alignas(64) float scores[kRows][kTile], weights[kRows][kTile];
  alignas(64) float mapped[kRows][kWidth];                                    // queries as pages need them
  alignas(64) float decoded[kTokens * kWidth], restored[kTokens * kColumns];  // tokens of a page
  float offset[kRows];
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

// How rows of numbers are rounded for codes of BITS bits: to bytes, or so that the sums of quads are
// bytes; fine: each block of columns to a unit of its own. Probabilities are never negative: one bit more.
template <int BITS, bool kPositive, bool kTables = false, bool kFine = false, bool kOfRows = false>
struct Rounding {
  static constexpr int kBits = BITS;
  static constexpr bool kIsPositive = kPositive, kHasTables = kTables, kIsFine = kFine;
  static constexpr bool kPairs = kTables && kPositive;  // two quads' sums add up to a byte
  // a quad's sum may be rounded up by 2
  static constexpr float kTop = kTables ? 125 : (kPositive ? 255 : 127);
  static constexpr float kLow = kPairs ? 30 : kTables ? 62 : 254;  // steps of the second term in a unit
  static constexpr float kMiddle = float((1 << BITS) - 1) / 2;  // of the code range
  // 12 times the squared error of Gaussian data's codes, in steps, and the variance of those codes; at
  // 4 bits the fewer numbers share a range, the more of it they use
  static constexpr float kError = BITS == 1 ? 1.7f : BITS == 2 ? 1.3f : 1.0f;
  static constexpr float kVariance = BITS == 1 ? 0.25f : BITS == 2 ? 1.1f : kFine ? 13.0f : 8.0f;
  // of quantization's error that rounding may add; where rows have scales of their own, those of the rows
  // that matter may be far above the average
  static constexpr float kShare = kOfRows ? 0.03f : kFine ? 0.1f : 0.09f;
  // Numbers that differ more in size than this make scores of which the softmax sees little else, and
  // there errors grow as quantization's no longer do.
  static constexpr float kSpread = kTables ? 9 : 5.5f;

  // Whether rounding may cost more than it should: the variance of a unit times that of codes around their
  // middle, against the square of what quantization did to the numbers. `spread` is the square of the
  // largest number, summed over columns.
  static bool is_coarse(float spread, float square) {
    constexpr float of_error = kVariance / (kTop * kTop * kError * kShare * kShare);
    constexpr float of_spread = kPositive ? 0 : 1 / (kSpread * kSpread);
    return spread * std::max(of_error, of_spread) > square;
  }

  static int unit_columns(int columns) { return kFine ? kUnitColumns : columns; }

  static F size(F y) {  // what must fit in a byte
    if constexpr (kTables) return sums_of_quads(abs(y));
    else return abs(y);
  }
};

// Columns [c, end), up to 64 at a time: fn(column, number of vectors as a constant).
template <class Fn>
[[gnu::always_inline]] inline void by_columns(int c, int end, const Fn& fn) {
  for (; c + 64 <= end; c += 64) fn(c, std::integral_constant<int, 4>());
  for (; c < end; c += kLanes) fn(c, std::integral_constant<int, 1>());
}

// Finds the units of H rows and whether rounding to them is coarse, from what `top_of(first, last, top,
// squares)` gathers over a block of columns: the largest sizes and sums of squares of each row.
template <class Rule, int H, class Fn>
[[gnu::always_inline]] inline void find_units(int columns, float square_of_group, int row, Units& units, const Fn& top_of) {
  F squares[H];
  float spread[H] = {}, square[H];
  repeat<H>([&](auto h) { squares[h] = set(0); });
  for (int c = 0, block = 0; c < columns; ++block) {
    const int end = std::min(columns, c + Rule::unit_columns(columns));
    F top[H];
    repeat<H>([&](auto h) { top[h] = set(0); });
    top_of(c, end, top, squares);
    float largest[H];
    maxima_of<H>(top, largest);
    for (int h = 0; h < H; ++h) {
      units.unit[block][row + h] = largest[h] * (1 / Rule::kTop);
      units.inverse[block][row + h] = largest[h] > 1e-30f ? Rule::kTop / largest[h] : 0;
      spread[h] += largest[h] * largest[h] * float(end - c);
    }
    c = end;
  }
  sums_of<H>(squares, square);
  for (int h = 0; h < H; ++h) units.is_coarse[row + h] = Rule::is_coarse(spread[h], square_of_group * square[h]);
}

// Where groups share units, the largest scales make them: what a group's squares are to the squares of those.
constexpr float square_of_group(int groups) { return groups > 1 ? 0.7f : 1; }

// The largest scales of sixteen columns: of all groups of a page, or 1 where rows have scales of their own.
inline F largest_scales(const uint16_t* scales, int groups, int columns, int c) {
  if (!scales) return set(1);
  F most = load_half(scales + c);
  for (int g = 1; g < groups; ++g) most = max(most, load_half(scales + g * columns + c));
  return most;
}

template <class Rule, int H>
inline void measure_queries(const float* x, int stride, int columns, const uint16_t* scales, int groups, int row, Units& units) {
  find_units<Rule, H>(columns, square_of_group(groups), row, units, [&](int c, int end, F (&top)[H], F (&squares)[H]) {
    for (; c < end; c += kLanes) {
      const F scale = largest_scales(scales, groups, columns, c);
      repeat<H>([&](auto h) {
        const F y = load(x + h * stride + c) * scale;
        top[h] = max(top[h], Rule::size(y));
        squares[h] = fma(y, y, squares[h]);
      });
    }
  });
}

// What rounding left of row h, where it matters: low = (y - round(y)) in smaller steps, y = x * scale in units.
template <class Rule>
inline void round_rest(const float* x, int columns, const uint16_t* scale, const Units& units, int row, int h, Numbers& n) {
  n.low_offset[h] = 0;
  for (int begin = 0, block = 0; begin < columns; begin += Rule::unit_columns(columns), ++block) {
    I counts = zero_int();
    for (int c = begin; c < std::min(columns, begin + Rule::unit_columns(columns)); c += kLanes) {
      F y = load(x + c) * set(units.inverse[block][row + h]);
      if (scale) y = y * load_half(scale + c);
      const I rest = to_int((y - round(y)) * set(Rule::kLow));
      counts = counts + rest;
      store_bytes(n.low[h] + c, rest);
    }
    n.low_unit[block][h] = n.unit[block][h] / Rule::kLow;
    n.low_offset[h] -= n.low_unit[block][h] * Rule::kMiddle * float(sum(counts));
  }
}

// Rounds rows x, times the scales of their columns if these have any, to their units.
//
// The sums count codes from the middle of their range, so that the part all codes share is exact and
// rounding meets only the deviations.
template <class Rule, int H>
inline void round_rows(const float* x, int stride, int columns, ColumnScales of, const Units& units, int row, Numbers& n) {
  F total[H];
  repeat<H>([&](auto h) { total[h] = set(0); });
  for (int begin = 0, block = 0; begin < columns; begin += Rule::unit_columns(columns), ++block) {
    const float *unit = units.unit[block] + row, *inverse = units.inverse[block] + row;
    F offsets[H];
    I counts[H];
    repeat<H>([&](auto h) { offsets[h] = set(0), counts[h] = zero_int(); });
    by_columns(begin, std::min(columns, begin + Rule::unit_columns(columns)), [&](int c, auto vectors) {
      F scales[vectors()], middles[vectors()];
      repeat<vectors()>([&](auto j) {
        scales[j] = of.scale ? load_half(of.scale + c + j * kLanes) : set(1);
        middles[j] = of.scale ? fma(scales[j], set(Rule::kMiddle), load_half(of.zero + c + j * kLanes)) : set(1);
      });
      repeat<H>([&](auto h) {
        I y[4] = {zero_int(), zero_int(), zero_int(), zero_int()};
        repeat<vectors()>([&](auto j) {
          const F xc = load(x + h * stride + c + j * kLanes);
          y[j] = to_int(xc * (scales[j] * set(inverse[h])));
          offsets[h] = fma(xc, middles[j], offsets[h]);
        });
        const B bytes = pack<Rule::kIsPositive>(y[0], y[1], y[2], y[3]);
        store_bytes(n.high[h] + c, bytes);
        counts[h] = add_bytes<Rule::kIsPositive>(counts[h], bytes);
      });
    });
    repeat<H>([&](auto h) {
      n.unit[block][h] = unit[h];
      total[h] = total[h] + fma(to_float(counts[h]), set(-Rule::kMiddle * unit[h]), offsets[h]);
    });
  }
  sums_of<H>(total, n.offset);
}

// --- codes times bytes ----------------------------------------------------------------------------

// acc[r][h] += codes of R blocks * numbers of H rows, over `vectors` vectors of a block.
template <int BITS, bool kPositive, int H, int R>
[[gnu::always_inline]] inline void multiply(I (&acc)[R][H], const uint8_t* codes, size_t block_bytes,
                                            int vectors, const int8_t* numbers, Fetch& fetch) {
  constexpr uint8_t kMask = (1 << BITS) - 1;
  for (int v = 0; v < vectors; ++v) {
    B word[R];
    repeat<R>([&](auto r) { word[r] = load_bytes(codes + r * block_bytes + v * 64); });
    if (v % 2 == 0) fetch.steps(R * std::min(2, vectors - v));  // asking costs instructions too
#pragma GCC unroll 1
    for (int at = 0; at < 8 / BITS; ++at, numbers += 4) {
      B code[R];
      repeat<R>([&](auto r) {
        code[r] = bits_at(word[r], 0, kMask);
        word[r] = shifted<BITS>(word[r]);
      });
      repeat<H>([&](auto h) {
        int32_t four;
        __builtin_memcpy(&four, numbers + h * kNumbers, 4);
        repeat<R>([&](auto r) {
          acc[r][h] = kPositive ? dot_unsigned(acc[r][h], code[r], four) : dot(acc[r][h], code[r], four);
        });
      });
    }
  }
}

// The sixteen columns that two neighbouring blocks of 1-bit codes keep in one vector.
template <bool kPositive, int H>
[[gnu::always_inline]] inline void multiply_tail(I (&acc)[H], const Half& part, const uint8_t* data, int block,
                                                 const int8_t* numbers) {
  const B word = load_bytes(data + part.tail_at + (block / 2) * 64);
  for (int at = 0; at < 4; ++at) {
    const B code = bits_at(word, at + 4 * (block % 2), 1);
    repeat<H>([&](auto h) {
      int32_t four;
      __builtin_memcpy(&four, numbers + h * kNumbers + (part.vectors * 8 + at) * 4, 4);
      acc[h] = kPositive ? dot_unsigned(acc[h], code, four) : dot(acc[h], code, four);
    });
  }
}

template <int H, int R>
[[gnu::always_inline]] inline void put_sums(const I (&acc)[R][H], int block, const float* unit, const float* offset,
                                            Result out) {
  repeat<R>([&](auto r) __attribute__((always_inline)) {
    repeat<H>([&](auto h) __attribute__((always_inline)) { out.put(h, block + r, fma(to_float(acc[r][h]), set(unit[h]), set(offset[h]))); });
  });
}

// Blocks [first, last), which share a row of scales, times H rows of numbers. Units of the next block of
// columns are kMaxH further on.
template <int BITS, bool kPositive, bool kFine, int H, int R>
inline void byte_sums(const Half& part, const uint8_t* data, int first, int last, const int8_t* numbers,
                      const float* unit, const float* offset, Result out, Fetch& fetch) {
  int block = first;
  for (; block + R <= last; block += R) {
    const uint8_t* codes = data + block * part.block_bytes;
    I acc[R][H];
    if constexpr (kFine) {
      constexpr int kVectors = kUnitColumns * BITS / 32;
      F sums[R][H];
      repeat<R>([&](auto r) { repeat<H>([&](auto h) { sums[r][h] = set(offset[h]); }); });
      for (int v = 0, b = 0; v < part.vectors; v += kVectors, ++b) {
        repeat<R>([&](auto r) { repeat<H>([&](auto h) { acc[r][h] = zero_int(); }); });
        multiply<BITS, kPositive, H, R>(acc, codes + v * 64, part.block_bytes, std::min(kVectors, part.vectors - v),
                                        numbers + b * kUnitColumns, fetch);
        repeat<R>([&](auto r) {
          repeat<H>([&](auto h) { sums[r][h] = fma(to_float(acc[r][h]), set(unit[b * kMaxH + h]), sums[r][h]); });
        });
      }
      repeat<R>([&](auto r) { repeat<H>([&](auto h) { out.put(h, block + r, sums[r][h]); }); });
    } else {
      repeat<R>([&](auto r) { repeat<H>([&](auto h) { acc[r][h] = zero_int(); }); });
      multiply<BITS, kPositive, H, R>(acc, codes, part.block_bytes, part.vectors, numbers, fetch);
      if constexpr (BITS == 1) {
        if (part.tail) repeat<R>([&](auto r) { multiply_tail<kPositive, H>(acc[r], part, data, block + r, numbers); });
      }
      put_sums<H, R>(acc, block, unit, offset, out);
    }
  }
  if constexpr (R > 1) {
    if (block < last) byte_sums<BITS, kPositive, kFine, H, R / 2>(part, data, block, last, numbers, unit, offset, out, fetch);
  }
}

constexpr int blocks_at_once(int h, int most) { return std::max(1, std::min(most, kAccumulators / h)); }

// --- 1-bit codes by table -------------------------------------------------------------------------

// acc[r][h] += the entries of tables that codes of R blocks select, over `vectors` vectors of a block: a
// nibble for a quad of columns at a time. kPairs: two entries fit in a byte and are added there.
template <bool kPairs, bool kPositive, int H, int R>
[[gnu::always_inline]] inline void look_up(I (&acc)[R][H], const uint8_t* codes, size_t block_bytes, int vectors,
                                           const uint8_t* tables, Fetch& fetch) {
  for (int v = 0; v < vectors; ++v, tables += 128) {
    B low[R], high[R];
    fetch.steps(R);
    repeat<R>([&](auto r) {
      const B word = load_bytes(codes + r * block_bytes + v * 64);
      low[r] = entries(word);
      high[r] = entries(shifted<4>(word));
    });
    repeat<H>([&](auto h) {
      const B first = load_bytes(tables + h * kColumns * 4), second = load_bytes(tables + h * kColumns * 4 + 64);
      repeat<R>([&](auto r) {
        const B one = lookup(first, low[r]), other = lookup(second, high[r]);
        if constexpr (kPairs) acc[r][h] = add_bytes<kPositive>(acc[r][h], one + other);
        else acc[r][h] = add_bytes<kPositive>(add_bytes<kPositive>(acc[r][h], one), other);
      });
    });
  }
}

// See multiply_tail.
template <bool kPositive, int H>
[[gnu::always_inline]] inline void look_up_tail(I (&acc)[H], const Half& part, const uint8_t* data, int block,
                                                const uint8_t* tables) {
  const B word = load_bytes(data + part.tail_at + (block / 2) * 64);
  const B index = entries(block % 2 ? shifted<4>(word) : word);
  repeat<H>([&](auto h) {
    acc[h] = add_bytes<kPositive>(acc[h], lookup(load_bytes(tables + h * kColumns * 4 + part.vectors * 128), index));
  });
}

template <int H>
inline void fill_tables(const int8_t* numbers, int columns, uint8_t* tables) {
  for (int h = 0; h < H; ++h) {
    by_columns(0, columns, [&](int c, auto vectors) {
      const auto make = vectors() == 4 ? choices_of_sixteen_quads : choices_of_quads;
      make(numbers + h * kNumbers + c, tables + 4 * (h * kColumns + c));
    });
  }
}

// As byte_sums, with tables.
template <bool kPairs, bool kPositive, int H, int R>
inline void table_sums(const Half& part, const uint8_t* data, int first, int last, const uint8_t* tables,
                       const float* unit, const float* offset, Result out, Fetch& fetch) {
  int block = first;
  for (; block + R <= last; block += R) {
    I acc[R][H];
    repeat<R>([&](auto r) { repeat<H>([&](auto h) { acc[r][h] = zero_int(); }); });
    look_up<kPairs, kPositive, H, R>(acc, data + block * part.block_bytes, part.block_bytes, part.vectors, tables, fetch);
    if (part.tail) {
      repeat<R>([&](auto r) { look_up_tail<kPositive, H>(acc[r], part, data, block + r, tables); });
    }
    put_sums<H, R>(acc, block, unit, offset, out);
  }
  if constexpr (R > 1) {
    if (block < last) table_sums<kPairs, kPositive, H, R / 2>(part, data, block, last, tables, unit, offset, out, fetch);
  }
}

// --- a part of a page -----------------------------------------------------------------------------

// Blocks [first, last) times H rows of numbers, in the way that suits the codes. kPositive: not for what
// rounding weights left.
template <class Rule, bool kPositive, int H>
inline void sum_rows(const Half& part, const uint8_t* data, int first, int last, const int8_t* numbers,
                     const float* unit, const float* offset, Result out, Fetch& fetch, Scratch& s) {
  if constexpr (Rule::kHasTables) {
    fill_tables<H>(numbers, part.columns, s.tables[0]);
    table_sums<Rule::kPairs, kPositive, H, blocks_at_once(H, 4)>(part, data, first, last, s.tables[0], unit, offset, out, fetch);
  } else {
    constexpr bool kFine = Rule::kIsFine;
    constexpr int R = kFine ? blocks_at_once(2 * H, 2) : blocks_at_once(H, 4);
    byte_sums<Rule::kBits, kPositive, kFine, H, R>(part, data, first, last, numbers, unit, offset, out, fetch);
  }
}

// Scales of the columns: per-channel keys (groups of tokens), values (groups of channels). Weights come
// with their units.
template <class Rule>
inline void codes_by_column(const Half& part, const uint8_t* data, const float* x, int stride, int rows, Result out,
                            Fetch& fetch, Scratch& s) {
  constexpr bool kPositive = Rule::kIsPositive;
  const int blocks = part.group / kLanes;
  Units& units = kPositive ? s.of_weights : s.of_queries;
  if constexpr (!kPositive) {
    fetch.pause();
    by_rows(rows, [&](int row, auto h) {
      measure_queries<Rule, h()>(x + row * stride, stride, part.columns, part.scales(data), part.groups, row, units);
    });
  }
  Numbers& n = s.numbers;
  for (int g = 0; g < part.groups; ++g) {
    const ColumnScales of = part.of_columns(data, g);
    const int first = g * blocks, last = first + blocks;
    by_rows(rows, [&](int row, auto h) {
      constexpr int H = h();
      const float* xr = x + row * stride;
      fetch.pause();
      round_rows<Rule, H>(xr, stride, part.columns, of, units, row, n);
      sum_rows<Rule, kPositive, H>(part, data, first, last, n.high[0], n.unit[0], n.offset, out.from(row), fetch, s);
      for (int h = 0; h < H; ++h) {
        if (!units.is_coarse[row + h]) continue;
        round_rest<Rule>(xr + h * stride, part.columns, of.scale, units, row, h, n);
        Result to = out.from(row + h);
        to.add = true;
        sum_rows<Rule, false, 1>(part, data, first, last, n.low[h], n.low_unit[0] + h, n.low_offset + h, to, fetch, s);
      }
    });
  }
}

// Calls fn with the Rounding for a part's codes.
template <bool kPositive, class Fn>
inline void with_rule(const Half& part, const Fn& fn) {
  if constexpr (kHasLookup) if (part.tables) return fn(Rounding<1, kPositive, true>());
  if (part.bits == 1) return fn(Rounding<1, kPositive>());
  if (part.bits == 2) return fn(Rounding<2, kPositive>());
  part.group < 64 ? fn(Rounding<4, kPositive, false, true>()) : fn(Rounding<4, kPositive>());
}

// Scales of the rows: per-token keys (groups of channels).
template <int BITS>
inline void codes_by_row(const Half& part, const uint8_t* data, const float* x, int stride, int rows, Result out,
                         Fetch& fetch, Scratch& s) {
  using Rule = Rounding<BITS, false, false, false, true>;
  const int vectors = part.group * BITS / 32;
  Numbers& n = s.numbers;
  for (int g = 0; g < part.groups; ++g) {
    const uint16_t* scale = part.scales(data) + g * part.rows;
    const uint16_t* zero = part.zeros(data) + g * part.rows;
    fetch.pause();
    by_rows(rows, [&](int row, auto h) {
      constexpr int H = h();
      const float* xg = x + row * stride + g * part.group;
      measure_queries<Rule, H>(xg, stride, part.group, nullptr, 1, row, s.of_queries);
      round_rows<Rule, H>(xg, stride, part.group, {nullptr, nullptr}, s.of_queries, row, n);
      const bool* coarse = s.of_queries.is_coarse + row;
      const bool has_low = std::any_of(coarse, coarse + H, [](bool is) { return is; });
      for (int i = 0; has_low && i < H; ++i) {
        round_rest<Rule>(xg + i * stride, part.group, nullptr, s.of_queries, row, i, n);
      }
      float total[H];
      repeat<H>([&](auto i) {
        F sum_x = set(0);
        for (int c = 0; c < part.group; c += kLanes) sum_x = sum_x + load(xg + i * stride + c);
        total[i] = sum(sum_x);
      });
      Result to = out.from(row);
      to.add |= g > 0;
      for (int block = 0; block < part.blocks; ++block) {
        I high[1][H], low[1][H];
        repeat<H>([&](auto i) { high[0][i] = low[0][i] = zero_int(); });
        const uint8_t* codes = data + block * part.block_bytes + g * vectors * 64;
        multiply<BITS, false, H, 1>(high, codes, 0, vectors, n.high[0], fetch);
        if (has_low) multiply<BITS, false, H, 1>(low, codes, 0, vectors, n.low[0], fetch);
        if (BITS == 1 && part.tail) {
          multiply_tail<false, H>(high[0], part, data, block, n.high[0]);
          if (has_low) multiply_tail<false, H>(low[0], part, data, block, n.low[0]);
        }
        const F sc = load_half(scale + block * kLanes);
        const F middle = fma(sc, set(Rule::kMiddle), load_half(zero + block * kLanes));
        repeat<H>([&](auto i) {
          // the codes' deviations from the middle of their range times x, then that middle times x
          F deviation = fma(to_float(high[0][i]), set(n.unit[0][i]), set(n.offset[i] - total[i]));
          if (has_low) deviation = deviation + fma(to_float(low[0][i]), set(n.low_unit[0][i]), set(n.low_offset[i]));
          to.put(i, block, fma(sc, deviation, middle * set(total[i])));
        });
      }
    });
  }
}

// --- rows of numbers that need float32 ------------------------------------------------------------

// Blocks of 8-bit codes or unquantized values as float32, column by column; fn(column, values of R blocks).
template <int R, class Fn>
[[gnu::always_inline]] inline void each_column(const Half& part, const uint8_t* data, int block, int first, int last, Fetch& fetch,
                        const Fn& fn) {
  const uint8_t* p = data + block * part.block_bytes;
  F value[R];
  if (part.bits == 8) {
    for (int c = first; c < last; c += 4) {
      B word[R];
      repeat<R>([&](auto r) {
        const uint8_t* at = p + r * part.block_bytes + c * kLanes;
        word[r] = load_bytes(at);
      });
      fetch.steps(R);
      repeat<4>([&](auto k) {
        repeat<R>([&](auto r) { value[r] = byte_to_float(word[r], k); });
        fn(c + k, value);
      });
    }
  } else {
    const int size = part.bits / 8;
    for (int c = first; c < last; ++c) {
      if (size == 4 || c % 2) fetch.steps(R);
      repeat<R>([&](auto r) {
        const uint8_t* at = p + r * part.block_bytes + c * kLanes * size;
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
                       const uint16_t* row_zero, Result out, Fetch& fetch) {
  for (; block + R <= blocks_end; block += R) {
    F acc[R][H];
    repeat<R>([&](auto r) { repeat<H>([&](auto h) { acc[r][h] = set(0); }); });
    each_column<R>(part, data, block, first, last, fetch, [&](int c, const F (&value)[R]) {
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
                           fetch);
    }
  }
}

constexpr int float_blocks(int h) { return kAccumulators >= 16 ? (h >= 8 ? 1 : 2) : 1; }

inline void eight_bits_by_column(const Half& part, const uint8_t* data, const float* x, int stride, int rows,
                                 Result out, Fetch& fetch, Scratch& s) {
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
                                     s.offset, nullptr, nullptr, out.from(row), fetch);
    });
  }
}

inline void eight_bits_by_row(const Half& part, const uint8_t* data, const float* x, int stride, int rows,
                              Result out, Fetch& fetch) {
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
                                         part.zeros(data) + g * part.rows, to.from(row), fetch);
    });
  }
}

inline void unquantized(const Half& part, const uint8_t* data, const float* x, int stride, int rows, Result out,
                        Fetch& fetch) {
  constexpr float kNone[kRows] = {};
  by_rows(rows, [&](int row, auto h) {
    float_sums<h(), float_blocks(h())>(part, data, 0, part.blocks, 0, part.columns, x + row * stride, stride, kNone,
                                       nullptr, nullptr, out.from(row), fetch);
  });
}

// out[i][row] (+)= sum over columns of x[i][column] * value[row][column], for one half of a page.
// `fetch`: what comes next, on its way meanwhile.
inline void keys_times(const Half& part, const uint8_t* data, const float* x, int stride, int rows, Result out,
                       Fetch& fetch, Scratch& s) {
  if (part.is_raw) return unquantized(part, data, x, stride, rows, out, fetch);
  switch (part.row_scales ? -part.bits : part.bits) {
    case 8: return eight_bits_by_column(part, data, x, stride, rows, out, fetch, s);
    case -1: return codes_by_row<1>(part, data, x, stride, rows, out, fetch, s);
    case -2: return codes_by_row<2>(part, data, x, stride, rows, out, fetch, s);
    case -4: return codes_by_row<4>(part, data, x, stride, rows, out, fetch, s);
    case -8: return eight_bits_by_row(part, data, x, stride, rows, out, fetch);
    default:
      with_rule<false>(part, [&](auto rule) {
        codes_by_column<decltype(rule)>(part, data, x, stride, rows, out, fetch, s);
      });
  }
}

// The same with weights, whose units are known where they meet codes.
inline void values_times(const Half& part, const uint8_t* data, const float* x, int stride, int rows, Result out,
                         Fetch& fetch, Scratch& s) {
  if (part.is_raw) return unquantized(part, data, x, stride, rows, out, fetch);
  if (part.bits == 8) return eight_bits_by_column(part, data, x, stride, rows, out, fetch, s);
  with_rule<true>(part, [&](auto rule) {
    codes_by_column<decltype(rule)>(part, data, x, stride, rows, out, fetch, s);
  });
}

}  // namespace bitkv::BITKV_ISA
