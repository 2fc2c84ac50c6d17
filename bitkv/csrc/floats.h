// Rows of numbers times 8-bit codes or unquantized values, which need float32; and either half of a page, whatever
// it holds.
//
// No include guard: attend.h includes this once.

namespace bitkv::BITKV_ISA {

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

// --- a half of a page ----------------------------------------------------------------------------

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
