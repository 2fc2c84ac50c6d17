// Rows of numbers to bytes, which codes are multiplied with.
//
// Scales never enter the inner loop: with k = s * code + z per channel,
//   sum_c x_c k_c = sum_c (x_c s_c) code_c + sum_c x_c z_c,
// so rows are scaled, rounded to a few bits and multiplied with the codes as bytes. What rounding costs is held
// against what quantization cost: a second term is added where the first would exceed a fixed share of it.
//
// No include guard: attend.h includes this once.

namespace bitkv::BITKV_ISA {

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

}  // namespace bitkv::BITKV_ISA
