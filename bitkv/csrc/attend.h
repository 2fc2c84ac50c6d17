// Attention over pages, for the vector vocabulary of one instruction set.
//
// Both halves are one operation: rows of codes times a few vectors (scaled queries for keys, scaled
// probabilities for values). Scales never enter the inner loop: with k = s * code + z per channel,
//   sum_c x_c k_c = sum_c (x_c s_c) code_c + sum_c x_c z_c,
// so the vectors are scaled, rounded to eight bits and multiplied with the codes as bytes. What rounding
// costs is bounded by what quantization cost: `prepare` adds a second term of eight bits where one
// would exceed a fixed share of it.
//
// No include guard: each isa_*.cpp includes this once, after its simd header.

namespace bitkv::BITKV_ISA {

constexpr int kRows = 32;          // query rows that share a pass over a page
constexpr int kColumns = 256;      // channels of a head or tokens of a page, at most
constexpr int kHotTokens = 128;    // of a tile of the hot window
constexpr int kMaxH = kAccumulators >= 16 ? 8 : 4;
constexpr float kLog2e = 1.44269504088896f;
constexpr float kNegligible = 0x1p-40f;  // a share of the sum that float32 cannot notice
constexpr float kHeadroom = 0x1p30f;     // weights may grow this far before `high` follows the scores

inline F exp2(F x) {
  const F bounded = max(x, set(-150.0f)), n = round(bounded), f = bounded - n;
  F p = fma(f, set(0.00133908633f), set(0.00967603177f));  // within 1e-7 of 2^f
  p = fma(p, f, set(0.0555035695f));
  p = fma(p, f, set(0.240221068f));
  p = fma(p, f, set(0.693147182f));
  p = fma(p, f, set(1.00000012f));
  return times_power_of_two(p, n);
}

inline float exp2(float x) {
  float lanes[kLanes];
  store(lanes, exp2(set(x)));
  return lanes[0];
}

// Calls fn(0), ..., fn(N - 1) with constants. Sums live in arrays, which stay in registers only where
// every index is a constant.
template <int N, class Fn>
[[gnu::always_inline]] inline void repeat(const Fn& fn) {
  [&]<int... i>(std::integer_sequence<int, i...>) { (fn(std::integral_constant<int, i>()), ...); }
  (std::make_integer_sequence<int, N>());
}

// Into the second-level cache: a page and the next do not fit in the first together.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// A part with everything that would otherwise be divided out for each page.
struct Half {
  int bits, rows, columns, group, groups, blocks, vectors;
  bool row_scales, is_raw, tail;
  DType dtype;
  size_t block_bytes, scales_at, zeros_at, tail_at, nbytes;

  explicit Half(const Part& p)
      : bits(p.bits), rows(p.rows), columns(p.columns), group(p.group),
        groups(p.is_raw() ? 1 : (p.row_scales ? p.columns : p.rows) / p.group), blocks(p.blocks()),
        vectors(p.is_raw() ? 0 : p.vectors()), row_scales(p.row_scales), is_raw(p.is_raw()), tail(p.has_tail()),
        dtype(p.dtype), block_bytes(p.block_bytes()), scales_at(p.code_bytes()),
        zeros_at(p.code_bytes() + 2 * size_t(p.num_scales())), tail_at(p.blocks() * p.block_bytes()),
        nbytes(p.nbytes()) {}

  const uint16_t* scales(const uint8_t* data) const { return reinterpret_cast<const uint16_t*>(data + scales_at); }
  const uint16_t* zeros(const uint8_t* data) const { return reinterpret_cast<const uint16_t*>(data + zeros_at); }
};

// What a set of query rows has gathered so far; the scores are in units of log2.
struct Softmax {
  float high;   // the score that weighs 1: the largest of the first tile, raised when it must be
  float total;  // sum of 2^(score - high)
  float* out;   // sum of 2^(score - high) * value
};

// Numbers ready to be multiplied with codes.
struct Numbers {
  alignas(64) int8_t high[kRows][kColumns];
  alignas(64) int8_t low[kRows][kColumns];  // what rounding left, in 1/254 of a unit
  float unit[kRows];
  float offset[kRows], low_offset[kRows];  // what turns sums of codes into sums of values
  bool has_low[kRows];
};

struct Scratch {
  Numbers numbers;
  alignas(64) float scale[kColumns], middle[kColumns], scaled[kRows][kColumns];
  alignas(64) float scores[kRows][kColumns], weights[kRows][kColumns];
};

// The variance of codes around their middle, on Gaussian data.
constexpr float code_variance(int bits) { return bits == 1 ? 0.25f : bits == 2 ? 1.1f : 7.3f; }

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

// H rows x times the scales of their columns, rounded to multiples of each row's `unit`.
//
// `middle` is the value of the middle of the code range: with codes counted from there, the part of the
// sum that all codes share is exact and rounding meets only the deviations. Probabilities are never
// negative, which leaves them one bit more.
template <int BITS, bool kPositive, int H>
inline void prepare(const float* x, int stride, int columns, int row, Scratch& s) {
  // rounding may add this share of the error that quantization made, in square
  constexpr float kShare = 0.07f * 0.07f, kTop = kPositive ? 255 : 127, kStep = kPositive ? 2 : 1;
  constexpr float kBound = code_variance(BITS) / (127.0f * 127.0f * kStep * kStep * kShare);
  constexpr float kMiddle = float((1 << BITS) - 1) / 2;
  Numbers& out = s.numbers;
  F top[H], squares[H], offset[H], total[H];
  repeat<H>([&](auto h) { top[h] = squares[h] = offset[h] = set(0); });
  for (int c = 0; c < columns; c += kLanes) {
    const F scale = load(s.scale + c), middle = load(s.middle + c);
    repeat<H>([&](auto h) {
      const F xc = load(x + h * stride + c), y = xc * scale;
      store(s.scaled[row + h] + c, y);
      top[h] = max(top[h], kPositive ? y : abs(y));
      squares[h] = fma(y, y, squares[h]);
      offset[h] = fma(xc, middle, offset[h]);
    });
  }
  float largest[H], square[H], sum_x[H], inverse[H], sum_n[H];
  maxima_of<H>(top, largest);
  sums_of<H>(squares, square);
  sums_of<H>(offset, sum_x);
  I numbers[H];
  repeat<H>([&](auto h) {
    inverse[h] = largest[h] > 1e-30f ? kTop / largest[h] : 0;
    numbers[h] = zero_int();
  });
  for (int c = 0; c < columns; c += kLanes) {
    repeat<H>([&](auto h) {
      const I n = to_int(load(s.scaled[row + h] + c) * set(inverse[h]));
      numbers[h] = numbers[h] + n;
      kPositive ? store_unsigned_bytes(out.high[row + h] + c, n) : store_bytes(out.high[row + h] + c, n);
    });
  }
  repeat<H>([&](auto h) { total[h] = to_float(numbers[h]); });
  sums_of<H>(total, sum_n);
  for (int h = 0; h < H; ++h) {
    out.unit[row + h] = largest[h] / kTop;
    out.offset[row + h] = sum_x[h] - out.unit[row + h] * kMiddle * sum_n[h];
    out.has_low[row + h] = largest[h] * largest[h] * float(columns) * kBound > square[h];
    if (!out.has_low[row + h]) continue;
    I low = zero_int();
    for (int c = 0; c < columns; c += kLanes) {
      const F y = load(s.scaled[row + h] + c) * set(inverse[h]);
      const I n = to_int((y - round(y)) * set(254));
      low = low + n;
      store_bytes(out.low[row + h] + c, n);
    }
    out.low_offset[row + h] = -(out.unit[row + h] / 254) * kMiddle * sum(to_float(low));
  }
}

// Whether any of H rows has a second term; the others then get one of zeros.
template <int H>
inline bool share_low(Numbers& n, int row) {
  bool any = false;
  for (int h = 0; h < H; ++h) any |= n.has_low[row + h];
  for (int h = 0; any && h < H; ++h) {
    if (n.has_low[row + h]) continue;
    __builtin_memset(n.low[row + h], 0, kColumns);
    n.low_offset[row + h] = 0;
  }
  return any;
}

// --- rows of codes times rows of bytes ------------------------------------------------------------

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
[[gnu::always_inline]] inline void multiply_tail(I (&acc)[H], const uint8_t* tail, int block,
                                                 const int8_t* numbers) {
  const B word = load_bytes(tail + (block / 2) * 64);
  repeat<4>([&](auto at) {
    const B code = bits_at(word, at + 4 * (block % 2), 1);
    repeat<H>([&](auto h) {
      int32_t four;
      __builtin_memcpy(&four, numbers + h * kColumns + at * 4, 4);
      acc[h] = dot(acc[h], code, four);
    });
  });
}

// Rows of a result [H][stride], set or added to.
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

// Blocks [first, last) of codes that share a row of scales, times rows [row, row + H) of numbers.
template <int BITS, bool kPositive, bool kTail, int H, int R>
inline void block_sums(const Half& part, const uint8_t* data, int first, int last,
                       const int8_t (*numbers)[kColumns], const float* unit, float share, const float* offset,
                       Result out, ptrdiff_t ahead) {
  const size_t block_bytes = part.block_bytes;
  const int vectors = part.vectors;
  int block = first;
  for (; block + R <= last; block += R) {
    I acc[R][H];
    repeat<R>([&](auto r) { repeat<H>([&](auto h) { acc[r][h] = zero_int(); }); });
    multiply<BITS, kPositive, H, R>(acc, data + block * block_bytes, block_bytes, vectors, numbers[0], ahead);
    repeat<R>([&](auto r) {
      if constexpr (kTail) multiply_tail<H>(acc[r], data + part.tail_at, block + r, numbers[0] + vectors * 32);
      repeat<H>([&](auto h) {
        out.put(h, block + r, fma(to_float(acc[r][h]), set(unit[h] * share), set(offset[h])));
      });
    });
  }
  if constexpr (R > 1) {
    if (block < last) {
      block_sums<BITS, kPositive, kTail, H, R / 2>(part, data, block, last, numbers, unit, share, offset, out, ahead);
    }
  }
}

constexpr int blocks_at_once(int h) {
  const int r = kAccumulators / h;
  return r >= 4 ? 4 : r;
}

template <int BITS, bool kPositive, bool kTail, int H>
inline void row_sums(const Half& part, const uint8_t* data, int first, int last, Numbers& n, int row, Result out,
                     ptrdiff_t ahead) {
  constexpr int R = blocks_at_once(H);
  block_sums<BITS, kPositive, kTail, H, R>(part, data, first, last, n.high + row, n.unit + row, 1, n.offset + row, out,
                                           ahead);
  if (!share_low<H>(n, row)) return;
  out.add = true;
  block_sums<BITS, false, kTail, H, R>(part, data, first, last, n.low + row, n.unit + row, 1 / 254.0f,
                                       n.low_offset + row, out, ahead);
}

// Calls fn with the number of rows to take next: 8, 4, 2 or 1 as a compile-time constant.
template <class Fn>
inline void by_rows(int rows, const Fn& fn) {
  int row = 0;
  if constexpr (kMaxH >= 8) for (; row + 8 <= rows; row += 8) fn(row, std::integral_constant<int, 8>());
  for (; row + 4 <= rows; row += 4) fn(row, std::integral_constant<int, 4>());
  if (row + 2 <= rows) { fn(row, std::integral_constant<int, 2>()); row += 2; }
  if (row < rows) fn(row, std::integral_constant<int, 1>());
}

// Scales of the columns: per-channel keys (groups of tokens), values (groups of channels).
template <int BITS, bool kPositive, bool kTail>
inline void codes_by_column(const Half& part, const uint8_t* data, const float* x, int stride, int rows,
                            Result out, ptrdiff_t ahead, Scratch& s) {
  constexpr float kMiddle = float((1 << BITS) - 1) / 2;
  const int blocks = part.group / kLanes;
  for (int g = 0; g < part.groups; ++g) {
    const uint16_t* scale = part.scales(data) + g * part.columns;
    const uint16_t* zero = part.zeros(data) + g * part.columns;
    for (int c = 0; c < part.columns; c += kLanes) {
      const F sc = load_half(scale + c);
      store(s.scale + c, sc);
      store(s.middle + c, fma(sc, set(kMiddle), load_half(zero + c)));
    }
    for (int c = 0; c < part.columns; c += 32) {
      prefetch(reinterpret_cast<const uint8_t*>(scale + c) + ahead);
      prefetch(reinterpret_cast<const uint8_t*>(zero + c) + ahead);
    }
    by_rows(rows, [&](int row, auto h) {
      prepare<BITS, kPositive, h()>(x + row * stride, stride, part.columns, row, s);
      row_sums<BITS, kPositive, kTail, h()>(part, data, g * blocks, (g + 1) * blocks, s.numbers, row,
                                            out.from(row), ahead);
    });
  }
}

// Scales of the rows: per-token keys (groups of channels).
template <int BITS, bool kTail>
inline void codes_by_row(const Half& part, const uint8_t* data, const float* x, int stride, int rows, Result out,
                         ptrdiff_t ahead, Scratch& s) {
  constexpr float kMiddle = float((1 << BITS) - 1) / 2;
  const int vectors = part.groups == 1 ? part.vectors : part.group * part.bits / 32;
  for (int c = 0; c < part.group; c += kLanes) {
    store(s.scale + c, set(1));
    store(s.middle + c, set(1));  // so that `offset` is the sum of x less the middles of the rounded numbers
  }
  for (int g = 0; g < part.groups; ++g) {
    const uint16_t* scale = part.scales(data) + g * part.rows;
    const uint16_t* zero = part.zeros(data) + g * part.rows;
    for (int c = 0; c < part.rows; c += 32) {
      prefetch(reinterpret_cast<const uint8_t*>(scale + c) + ahead);
      prefetch(reinterpret_cast<const uint8_t*>(zero + c) + ahead);
    }
    by_rows(rows, [&](int row, auto h) {
      constexpr int H = h();
      Numbers& n = s.numbers;
      const float* xg = x + row * stride + g * part.group;
      prepare<BITS, false, H>(xg, stride, part.group, row, s);
      const bool has_low = share_low<H>(n, row);
      float total[H], offset[H];
      for (int i = 0; i < H; ++i) {
        F sum_x = set(0);
        for (int c = 0; c < part.group; c += kLanes) sum_x = sum_x + load(xg + i * stride + c);
        total[i] = sum(sum_x);
        offset[i] = n.offset[row + i] - total[i] + (has_low ? n.low_offset[row + i] : 0);
      }
      Result to = out.from(row);
      to.add |= g > 0;
      for (int block = 0; block < part.blocks; ++block) {
        I high[1][H], low[1][H];
        repeat<H>([&](auto i) { high[0][i] = low[0][i] = zero_int(); });
        const uint8_t* codes = data + block * part.block_bytes + g * vectors * 64;
        multiply<BITS, false, H, 1>(high, codes, 0, vectors, n.high[row], ahead);
        if (has_low) multiply<BITS, false, H, 1>(low, codes, 0, vectors, n.low[row], ahead);
        if constexpr (kTail) {
          multiply_tail<H>(high[0], data + part.tail_at, block, n.high[row] + vectors * 32);
          if (has_low) multiply_tail<H>(low[0], data + part.tail_at, block, n.low[row] + vectors * 32);
        }
        const F sc = load_half(scale + block * kLanes), z = load_half(zero + block * kLanes);
        const F middle = fma(sc, set(kMiddle), z);
        repeat<H>([&](auto i) {
          const float unit = n.unit[row + i];
          F deviation = fma(to_float(high[0][i]), set(unit), set(offset[i]));
          deviation = fma(to_float(low[0][i]), set(unit / 254), deviation);
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
  float offset[kRows];
  for (int g = 0; g < part.groups; ++g) {
    const uint16_t* scale = part.scales(data) + g * part.columns;
    const uint16_t* zero = part.zeros(data) + g * part.columns;
    for (int i = 0; i < rows; ++i) {
      F of_zero = set(0);
      for (int c = 0; c < part.columns; c += kLanes) {
        const F xc = load(x + i * stride + c);
        store(s.scaled[i] + c, xc * load_half(scale + c));
        of_zero = fma(xc, load_half(zero + c), of_zero);
      }
      offset[i] = sum(of_zero);
    }
    by_rows(rows, [&](int row, auto h) {
      float_sums<h(), float_blocks(h())>(part, data, g * blocks, (g + 1) * blocks, 0, part.columns, s.scaled[row],
                                         kColumns, offset + row, nullptr, nullptr, out.from(row), ahead);
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
template <bool kPositive>
inline void rows_times(const Half& part, const uint8_t* data, const float* x, int stride, int rows, Result out,
                       ptrdiff_t ahead, Scratch& s) {
  if (part.is_raw) return unquantized(part, data, x, stride, rows, out, ahead);
  if constexpr (!kPositive) {  // keys
    if (part.row_scales) {
      switch (part.bits) {
        case 1: return part.tail ? codes_by_row<1, true>(part, data, x, stride, rows, out, ahead, s)
                                       : codes_by_row<1, false>(part, data, x, stride, rows, out, ahead, s);
        case 2: return codes_by_row<2, false>(part, data, x, stride, rows, out, ahead, s);
        case 4: return codes_by_row<4, false>(part, data, x, stride, rows, out, ahead, s);
        default: return eight_bits_by_row(part, data, x, stride, rows, out, ahead);
      }
    }
    if (part.tail) return codes_by_column<1, false, true>(part, data, x, stride, rows, out, ahead, s);
  }
  switch (part.bits) {
    case 1: return codes_by_column<1, kPositive, false>(part, data, x, stride, rows, out, ahead, s);
    case 2: return codes_by_column<2, kPositive, false>(part, data, x, stride, rows, out, ahead, s);
    case 4: return codes_by_column<4, kPositive, false>(part, data, x, stride, rows, out, ahead, s);
    default: return eight_bits_by_column(part, data, x, stride, rows, out, ahead, s);
  }
}

// --- softmax over tiles ---------------------------------------------------------------------------

// Query rows of one KV head and sequence: x = q * scale (in units of log2 unless capped), positions.
struct Queries {
  const float* x;          // [rows][head_dim]
  const int64_t* last;     // newest token that each row sees
  Softmax* softmax;
  int rows;
};

inline float largest(const float* score, int count) {
  F top = load(score);
  for (int t = kLanes; t < count; t += kLanes) top = max(top, load(score + t));
  return max(top);
}

// Makes `high` the score that weighs 1.
inline void raise(const AttendRequest& r, Softmax& state, float high) {
  if (high == -INFINITY) return;
  const float decay = state.total > 0 ? exp2(state.high - high) : 0;
  for (int c = 0; c < r.head_dim; c += kLanes) store(state.out + c, load(state.out + c) * set(decay));
  state.total *= decay;
  state.high = high;
}

// Hides what rows do not see of tokens [first, first + count), whose scores are [rows][kColumns]; then
// turns the scores into weights relative to `high`. False if all are negligible.
inline bool soften(const AttendRequest& r, const Queries& q, int64_t first, int count, Scratch& s) {
  bool matters = false;
  const int padded = (count + kLanes - 1) / kLanes * kLanes;
  for (int i = 0; i < q.rows; ++i) {
    float* score = s.scores[i];
    if (r.softcap > 0) {
      for (int t = 0; t < padded; t += kLanes) {
        const F y = min(load(score + t) * set(2 * kLog2e / r.softcap), set(60));
        const F tanh = set(1) - set(2) / (exp2(y) + set(1));
        store(score + t, tanh * set(r.softcap * kLog2e));
      }
    }
    const int64_t end = std::clamp<int64_t>(q.last[i] + 1 - first, 0, count);
    const int64_t begin = std::clamp<int64_t>(q.last[i] + 1 - r.window - first, 0, end);
    for (int64_t t = 0; t < begin; ++t) score[t] = -INFINITY;
    for (int64_t t = end; t < padded; ++t) score[t] = -INFINITY;
    Softmax& state = q.softmax[i];
    if (state.high == -INFINITY) raise(r, state, largest(score, padded));
    F total = set(0), top = set(0);
    for (int t = 0; t < padded; t += kLanes) {
      const F p = exp2(load(score + t) - set(state.high));
      store(s.weights[i] + t, p);
      total = total + p;
      top = max(top, p);
    }
    if (max(top) > kHeadroom) {
      raise(r, state, largest(score, padded));
      total = set(0);
      for (int t = 0; t < padded; t += kLanes) {
        const F p = exp2(load(score + t) - set(state.high));
        store(s.weights[i] + t, p);
        total = total + p;
      }
    }
    const float added = sum(total);
    matters |= added > state.total * kNegligible;
    state.total += added;
  }
  return matters;
}

inline bool sees_any(const AttendRequest& r, const Queries& q, int64_t first, int64_t count) {
  for (int i = 0; i < q.rows; ++i) {
    if (q.last[i] >= first && q.last[i] - r.window < first + count - 1) return true;
  }
  return false;
}

inline void attend_page(const AttendRequest& r, const Half& key, const Half& value, const Queries& q,
                        const uint8_t* page, int64_t first, ptrdiff_t ahead, Scratch& s) {
  if (!sees_any(r, q, first, r.page_size)) return;
  rows_times<false>(key, page, q.x, r.head_dim, q.rows, {s.scores[0], kColumns, false}, ahead, s);
  if (!soften(r, q, first, r.page_size, s)) return;
  rows_times<true>(value, page + key.nbytes, s.weights[0], kColumns, q.rows,
             {q.softmax[0].out, r.head_dim, true}, ahead, s);
}

// --- the hot window -------------------------------------------------------------------------------

inline F load_any(const void* p, DType dtype, int64_t index) {
  return dtype == DType::f32 ? load(static_cast<const float*>(p) + index)
                             : load(static_cast<const uint16_t*>(p) + index, dtype);
}

// Slots [begin, end) of the hot window, at most kHotTokens, which hold the tokens from `first` on.
inline void attend_hot(const AttendRequest& r, const Queries& q, int64_t offset, int begin, int end, int64_t first,
                       Scratch& s) {
  const int count = end - begin, dim = r.head_dim;
  if (count <= 0 || !sees_any(r, q, first, count)) return;
  offset += int64_t(begin) * dim;
  by_rows(q.rows, [&](int row, auto h) {
    for (int t = 0; t < count; ++t) {
      F acc[h()];
      repeat<h()>([&](auto i) { acc[i] = set(0); });
      for (int c = 0; c < dim; c += kLanes) {
        const F k = load_any(r.hot_k, r.hot_dtype, offset + int64_t(t) * dim + c);
        repeat<h()>([&](auto i) { acc[i] = fma(k, load(q.x + (row + i) * dim + c), acc[i]); });
      }
      repeat<h()>([&](auto i) { s.scores[row + i][t] = sum(acc[i]); });
    }
  });
  if (!soften(r, q, first, count, s)) return;
  by_rows(q.rows, [&](int row, auto h) {
    for (int c = 0; c < dim; c += kLanes) {
      F acc[h()];
      repeat<h()>([&](auto i) { acc[i] = load(q.softmax[row + i].out + c); });
      for (int t = 0; t < count; ++t) {
        const F v = load_any(r.hot_v, r.hot_dtype, offset + int64_t(t) * dim + c);
        repeat<h()>([&](auto i) { acc[i] = fma(v, set(s.weights[row + i][t]), acc[i]); });
      }
      repeat<h()>([&](auto i) { store(q.softmax[row + i].out + c, acc[i]); });
    }
  });
}

// --- the work and its division --------------------------------------------------------------------

// How a call is cut into items that threads take: by the shapes alone, so that results do not depend
// on the number of threads. With few query rows an item is a range of pages, all KV heads (their
// pages lie side by side); with many, it is a tile of rows of one KV head.
struct Plan {
  Half key, value;
  size_t page_bytes;
  int rows;         // query rows of a KV head: heads that share it times queries
  int tiles;        // of kRows rows
  int head_ranges;  // 1: all KV heads in one item
  int parts;        // of a sequence, attended separately and merged
  int pages_a_part, hot_parts;
  int hot_a_part;

  explicit Plan(const AttendRequest& r) : key(r.key), value(r.value), page_bytes(r.page_bytes()) {
    rows = r.heads / r.kv_heads * r.queries;
    tiles = (rows + kRows - 1) / kRows;
    head_ranges = tiles == 1 ? 1 : r.kv_heads;
    int pages = 0, hot = 0;
    for (int b = 0; b < r.batch; ++b) {
      pages = std::max(pages, r.packed_len[b] / r.page_size);
      hot = std::max(hot, r.hot_len[b]);
    }
    const int items = r.batch * tiles * head_ranges;
    if (items >= 32 && tiles > 1) {  // enough for any number of threads
      parts = 1, pages_a_part = pages, hot_parts = 0, hot_a_part = hot;
      return;
    }
    const int wanted = std::max(1, 64 / items);
    pages_a_part = std::max(4, (pages + wanted - 1) / wanted);
    hot_a_part = kHotTokens;
    hot_parts = (hot + hot_a_part - 1) / hot_a_part;
    parts = (pages + pages_a_part - 1) / pages_a_part + hot_parts;
    parts = std::max(parts, 1);
  }

  int items(const AttendRequest& r) const { return r.batch * parts * tiles * head_ranges; }
};

inline float* grown(std::vector<float>& buffer, size_t size) {
  if (buffer.size() < size) buffer.resize(size);
  return buffer.data();
}

inline void load_queries(const AttendRequest& r, int64_t row, int rows, float* x) {
  const float factor = r.softcap > 0 ? r.scale : r.scale * kLog2e;
  for (int64_t i = 0; i < int64_t(rows) * r.head_dim; i += kLanes) {
    store(x + i, load_any(r.q, r.dtype, row * r.head_dim + i) * set(factor));
  }
}

inline void finish(const AttendRequest& r, int64_t row, float high, float total, const float* sums) {
  r.lse[row] = total > 0 ? (high + std::log2(total)) / kLog2e : -INFINITY;
  const float factor = total > 0 ? 1 / total : 0;
  for (int c = 0; c < r.head_dim; c += kLanes) {
    const F y = load(sums + c) * set(factor);
    const int64_t at = row * r.head_dim + c;
    if (r.dtype == DType::f32) store(static_cast<float*>(r.out) + at, y);
    else if (r.dtype == DType::f16) store_half(static_cast<uint16_t*>(r.out) + at, y);
    else {
      float lanes[kLanes];
      store(lanes, y);
      for (int i = 0; i < kLanes; ++i) {  // nearest, ties to even
        const uint32_t u = std::bit_cast<uint32_t>(lanes[i]);
        static_cast<uint16_t*>(r.out)[at + i] = uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
      }
    }
  }
}

// One item: part `p` of sequence `b` for a tile of query rows and a range of KV heads.
inline void attend_item(const AttendRequest& r, const Plan& plan, int item, float* partials) {
  static thread_local std::vector<float> buffer;
  static thread_local std::vector<Softmax> softmaxes;
  static thread_local std::unique_ptr<Scratch> scratch;
  if (!scratch) scratch = std::make_unique<Scratch>();
  const int p = item % plan.parts, range = item / plan.parts % plan.head_ranges;
  const int tile = item / plan.parts / plan.head_ranges % plan.tiles;
  const int b = item / plan.parts / plan.head_ranges / plan.tiles;
  const int head0 = plan.head_ranges == 1 ? 0 : range, heads = plan.head_ranges == 1 ? r.kv_heads : 1;
  const int row0 = tile * kRows, rows = std::min(kRows, plan.rows - row0);
  const int dim = r.head_dim;

  float* x = grown(buffer, size_t(2) * heads * rows * dim + 2 * kLanes);
  float* out = x + size_t(heads) * rows * dim;
  std::fill_n(out, size_t(heads) * rows * dim, 0.0f);
  softmaxes.resize(std::max(softmaxes.size(), size_t(heads) * rows));
  int64_t last[kRows];
  for (int i = 0; i < rows; ++i) last[i] = r.positions[int64_t(b) * r.queries + (row0 + i) % r.queries];
  const auto global_row = [&](int h) { return (int64_t(b) * r.kv_heads + head0 + h) * plan.rows + row0; };
  const auto queries = [&](int h) -> Queries {
    return {x + size_t(h) * rows * dim, last, softmaxes.data() + size_t(h) * rows, rows};
  };
  for (int h = 0; h < heads; ++h) {
    load_queries(r, global_row(h), rows, x + size_t(h) * rows * dim);
    for (int i = 0; i < rows; ++i) {
      softmaxes[size_t(h) * rows + i] = {-INFINITY, 0, out + (size_t(h) * rows + i) * dim};
    }
  }

  const int page_parts = plan.parts - plan.hot_parts, num_pages = r.packed_len[b] / r.page_size;
  const bool whole = plan.parts == 1;
  if (whole || p < page_parts) {
    const int begin = p * plan.pages_a_part, end = std::min(num_pages, begin + plan.pages_a_part);
    const int32_t* table = r.block_table + int64_t(b) * r.table_width;
    const auto page_at = [&](int i, int h) {
      return r.pages + (int64_t(table[i]) * r.kv_heads + head0 + h) * int64_t(plan.page_bytes);
    };
    for (int i = begin; i < end; ++i) {
      for (int h = 0; h < heads; ++h) {
        const uint8_t* page = page_at(i, h);
        const uint8_t* next = h + 1 < heads ? page + plan.page_bytes : i + 1 < end ? page_at(i + 1, 0) : page;
        attend_page(r, plan.key, plan.value, queries(h), page, r.num_sink_tokens + int64_t(i) * r.page_size, next - page, *scratch);
      }
    }
  }
  if (whole || p >= page_parts) {
    const int begin = whole ? 0 : (p - page_parts) * plan.hot_a_part;
    const int end = std::min(r.hot_len[b], whole ? r.hot_len[b] : begin + plan.hot_a_part);
    for (int h = 0; h < heads; ++h) {
      const int64_t offset = b * r.hot_batch_stride + (head0 + h) * r.hot_head_stride;
      for (int slot = begin; slot < end;) {
        // sinks come before the pages, the others after them
        const bool is_sink = slot < r.num_sink_tokens;
        int stop = std::min(end, slot + kHotTokens);
        if (is_sink) stop = std::min(stop, r.num_sink_tokens);
        attend_hot(r, queries(h), offset, slot, stop, is_sink ? slot : slot + r.packed_len[b], *scratch);
        slot = stop;
      }
    }
  }

  for (int h = 0; h < heads; ++h) {
    for (int i = 0; i < rows; ++i) {
      const Softmax& state = softmaxes[size_t(h) * rows + i];
      if (whole) {
        finish(r, global_row(h) + i, state.high, state.total, state.out);
        continue;
      }
      float* to = partials + ((global_row(h) + i) * plan.parts + p) * (dim + kLanes);
      to[0] = state.high, to[1] = state.total;
      for (int c = 0; c < dim; c += kLanes) store(to + kLanes + c, load(state.out + c));
    }
  }
}

inline void merge(const AttendRequest& r, const Plan& plan, int64_t row, const float* partials) {
  const int stride = r.head_dim + kLanes;
  const float* parts = partials + row * plan.parts * stride;
  float high = -INFINITY, total = 0;
  for (int p = 0; p < plan.parts; ++p) high = std::max(high, parts[p * stride]);
  float sums[kColumns] = {};
  for (int p = 0; p < plan.parts; ++p) {
    const float* part = parts + p * stride;
    if (part[1] == 0) continue;
    const float weight = exp2(part[0] - high);
    total += weight * part[1];
    for (int c = 0; c < r.head_dim; c += kLanes) {
      store(sums + c, fma(load(part + kLanes + c), set(weight), load(sums + c)));
    }
  }
  finish(r, row, high, total, sums);
}

void attend(const AttendRequest& r) {
  if (r.batch == 0 || r.queries == 0) return;
  static thread_local std::vector<float> buffer;
  const Plan plan(r);
  const int64_t rows = int64_t(r.batch) * r.heads * r.queries;
  float* partials = plan.parts == 1 ? nullptr : grown(buffer, size_t(rows) * plan.parts * (r.head_dim + kLanes));
  parallel_for(plan.items(r), r.threads, [&](int item) { attend_item(r, plan, item, partials); });
  if (plan.parts == 1) return;
  constexpr int kRowsAnItem = 64;
  parallel_for(int((rows + kRowsAnItem - 1) / kRowsAnItem), r.threads, [&](int item) {
    const int64_t end = std::min(rows, int64_t(item + 1) * kRowsAnItem);
    for (int64_t row = int64_t(item) * kRowsAnItem; row < end; ++row) merge(r, plan, row, partials);
  });
}

}  // namespace bitkv::BITKV_ISA
