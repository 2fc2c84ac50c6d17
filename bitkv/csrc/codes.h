// Rows of bytes times codes of 1, 2 and 4 bits, which is both halves of attention: scaled queries for keys, scaled
// probabilities for values.
//
// No include guard: attend.h includes this once.

namespace bitkv::BITKV_ISA {

// acc[r][h] += codes of R blocks * numbers of H rows, over `vectors` vectors of a block.
template <int BITS, bool kPositive, int H, int R>
[[gnu::always_inline]] inline void multiply(I (&acc)[R][H], const uint8_t* codes, size_t block_bytes,
                                            int vectors, const int8_t* numbers, Fetch& fetch) {
  constexpr uint8_t kMask = (1 << BITS) - 1;
  for (int v = 0; v < vectors; ++v) {
    B word[R];
    repeat<R>([&](auto r) { word[r] = load_bytes(codes + r * block_bytes + v * 64); });
    if (v % 2 == 0) fetch.steps(R * std::min(2, vectors - v));  // asking costs instructions too
    Products sums[R][H];  // of 16 bits where that is faster
    repeat<R>([&](auto r) { repeat<H>([&](auto h) { sums[r][h] = start(acc[r][h]); }); });
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
          sums[r][h] = kPositive ? dot_unsigned(sums[r][h], code[r], four) : dot(sums[r][h], code[r], four);
        });
      });
    }
    repeat<R>([&](auto r) { repeat<H>([&](auto h) { acc[r][h] = finish(acc[r][h], sums[r][h]); }); });
  }
}

// The sixteen columns that two neighbouring blocks of 1-bit codes keep in one vector.
template <bool kPositive, int H>
[[gnu::always_inline]] inline void multiply_tail(I (&acc)[H], const Half& part, const uint8_t* data, int block,
                                                 const int8_t* numbers) {
  const B word = load_bytes(data + part.tail_at + (block / 2) * 64);
  Products sums[H];
  repeat<H>([&](auto h) { sums[h] = start(acc[h]); });
  for (int at = 0; at < 4; ++at) {
    const B code = bits_at(word, at + 4 * (block % 2), 1);
    repeat<H>([&](auto h) {
      int32_t four;
      __builtin_memcpy(&four, numbers + h * kNumbers + (part.vectors * 8 + at) * 4, 4);
      sums[h] = kPositive ? dot_unsigned(sums[h], code, four) : dot(sums[h], code, four);
    });
  }
  repeat<H>([&](auto h) { acc[h] = finish(acc[h], sums[h]); });
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

}  // namespace bitkv::BITKV_ISA
