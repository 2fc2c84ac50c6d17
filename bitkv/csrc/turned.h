// Keys before the rotary embedding, looked up: entries as 16-bit integers, turned in pairs of channels and multiplied
// with four rows while they are in registers; where codes are coarse, as bytes, and slow pairs not turned within a page.
//
// No include guard: attend.h includes this once.

namespace bitkv::BITKV_ISA {

constexpr int kPairs = 32;            // of channels that are turned while sums are in registers
constexpr int kMatrixPairs = 32;      // of channels that fill sixteen quads
constexpr float kStillShare = 0.04f;  // of quantization's error that pairs may add which are not turned within a page

// What a pair of channels of 64 tokens is turned with, in registers [pairs][vectors of 64 tokens][kWordAngles or kByteAngles].
constexpr int kWordAngles = 4, kByteAngles = 8;
constexpr float kTurnedUnit = 128 / 127.0f;  // of keys that were turned as bytes, beside that of those that were not

// From which pair on all stay as they are within a page; even. A place is off by up to the angle to the page's middle, by
// a third of its square in the mean.
inline int find_still(const Turns& turns, const Tables& tables) {
  const float* energies = tables.energies();
  float left = kStillShare * kStillShare * std::accumulate(tables.errors(), tables.errors() + tables.width, 0.0f);
  int first = turns.pairs / 2 * 2;
  for (; first > 0; first -= 2) {
    for (int i = first - 2; i < first; ++i) {
      const float angle = turns.inv_freq[i] * float(turns.middle());
      left -= angle * angle / 3 * (energies[i] + energies[i + turns.pairs]);
    }
    if (left < 0) break;
  }
  return first;
}

// Cosines times 2^15, then sines, as words of even and of odd tokens.
inline void word_angles(const Turns& turns, int16_t* out) {
  for (int i = 0; i < turns.pairs; ++i) {
    for (int t = 0; t < turns.page_size; ++t) {
      int16_t* to = out + (size_t(i) * turns.page_size + t / kVector * kVector) * 2 + t % 2 * 32 + t % kVector / 2;
      const size_t at = size_t(t) * turns.pairs + i;
      to[0] = int16_t(std::nearbyint(32767 * turns.cos[at])), to[64] = int16_t(std::nearbyint(32767 * turns.sin[at]));
    }
  }
}

// For channels as bytes, kBias above what they stand for: bytes (cos, -sin), then (sin, cos), times 127, for pairs of
// channels that were unpacked; then words that leave those sums of products 2^14 above what they stand for.
inline void byte_angles(const Turns& turns, int16_t* out) {
  const auto word = [](int low, int high) { return int16_t((low & 255) | high * 256); };
  for (int i = 0; i < turns.pairs; ++i) {
    for (int t = 0; t < turns.page_size; ++t) {
      // unpacking leaves halves of eight tokens from each sixteen
      int16_t* to = out + (size_t(i) * turns.page_size + t / kVector * kVector) * 4;
      to += t % 16 / 8 * 32 + t % kVector / 16 * 8 + t % 8;
      const size_t at = size_t(t) * turns.pairs + i;
      const int cos = int(std::nearbyint(127 * turns.cos[at])), sin = int(std::nearbyint(127 * turns.sin[at]));
      to[0] = word(cos, -sin), to[64] = word(sin, cos);
      to[128] = int16_t(kBias * (cos - sin) - (1 << 14)), to[192] = int16_t(kBias * (cos + sin) - (1 << 14));
    }
  }
}

// The entries of 64 tokens in one channel as 16-bit words: those of even and of odd tokens.
struct Words {
  V even, odd;

  [[gnu::always_inline]] explicit Words(V high)
      : even(_mm512_slli_epi16(high, 8)), odd(_mm512_and_si512(high, _mm512_set1_epi16(int16_t(0xff00)))) {}

  // Looked up in the high parts, and in the low parts where they are needed.
  template <bool kFine>
  [[gnu::always_inline]] static Words of(const Tables& tables, int channel, const Index& index) {
    const uint8_t* table = tables.of(channel);
    Words x(index.look_up(table));
    if constexpr (kFine) {
      const V low = index.look_up(table + tables.low());
      x.even = _mm512_ternarylogic_epi32(x.even, low, _mm512_set1_epi16(int16_t(0xff00)), 0xf4);
      x.odd = _mm512_or_si512(x.odd, _mm512_srli_epi16(low, 8));
    }
    return x;
  }
};

// Rows of a page's queries in each pair (a, b), and what their sums are multiples of.
struct TurnedQueries {
  alignas(64) int32_t words[kRows][kColumns / 2];  // 16-bit words a, b of each pair
  alignas(64) int32_t bytes[kRows][kColumns / 4];  // bytes a, a', b, b' of each two pairs
  float unit[kRows], offset[kRows];
};

// Pairs whose channels share codes with those of their neighbour, so that two pairs are looked up together.
inline bool are_even(int pairs, int channels) { return pairs % 2 == 0 && channels % 2 == 0; }

// Whether bytes will do for queries x in the units of their channels, whose keys' errors are known.
inline bool are_coarse(const float* x, int width, const Tables& tables) {
  F top = set(0), error = set(0);
  for (int c = 0; c < width; c += kLanes) {
    const F xc = load(x + c);
    top = max(top, abs(xc * load(tables.units() + c)));
    error = fma(xc * xc, load(tables.errors() + c), error);
  }
  const float unit = max(top) * (std::sqrt(2.0f) / 127);  // turning may make one larger
  return unit * unit / 12 * tables.squares() <= kLookupShare * kLookupShare * sum(error);
}

// Queries, in units of the keys of their pairs, as words.
inline void round_turned_to_words(const float* x, int pairs, TurnedQueries& q, int row) {
  F total = set(0), top = set(0);
  for (int i = 0; i < 2 * pairs; i += kLanes) {
    const F y = abs(load(x + i));
    total = total + y, top = max(top, y);
  }
  // no sum of products may pass 2^31, keys being below 2^15
  const float unit = std::max({sum(total) / 65000, max(top) / 32767, 1e-30f});
  q.unit[row] = unit, q.offset[row] = 0;
  for (int i = 0; i < pairs; i += kLanes) {
    const V a = to_int(load(x + i) * set(1 / unit)).v, b = to_int(load(x + pairs + i) * set(1 / unit)).v;
    store_int(q.words[row] + i, {_mm512_or_si512(_mm512_and_si512(a, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(b, 16))});
  }
}

// Rows of queries times a factor that makes 127 the longest of their pairs: no turn takes them out of bytes.
struct ScaledQueries {
  alignas(64) float x[kRows][2][kColumns / 2];  // halves of pairs, zeros up to whole registers
  float unit[kRows];
};

// `factors`: of pairs, whose keys are in units of their own.
inline void scale_to_bytes(const float* x, int pairs, const float* factors, ScaledQueries& q, int row) {
  float(*to)[kColumns / 2] = q.x[row];
  F top = set(0);
  for (int i = 0; i < pairs; i += kLanes) {
    const __mmask16 some = __mmask16((1u << std::min(pairs - i, kLanes)) - 1);
    const __m512 factor = _mm512_maskz_loadu_ps(some, factors + i);
    const F a{_mm512_mul_ps(factor, _mm512_maskz_loadu_ps(some, x + i))};
    const F b{_mm512_mul_ps(factor, _mm512_maskz_loadu_ps(some, x + pairs + i))};
    store(to[0] + i, a), store(to[1] + i, b);
    top = max(top, fma(a, a, b * b));
  }
  const float longest = std::max(std::sqrt(max(top)), 1e-18f);
  q.unit[row] = longest / 127;
  const F inverse = set(127 / longest);
  for (int i = 0; i < pairs; i += kLanes) {
    store(to[0] + i, load(to[0] + i) * inverse), store(to[1] + i, load(to[1] + i) * inverse);
  }
}

// An item's queries for keys before the rotary embedding.
struct ItemQueries {
  bool as_bytes;
  int still;                    // from which pair on keys are not turned within a page
  float factors[kColumns / 2];  // of pairs, while they are turned
  ScaledQueries scaled;         // as_bytes: with the factors in them

  void make(const AttendRequest& r, const Plan& plan, const Queries& q, int head) {
    const Side& key = r.key;
    const Tables tables(key, TableKind::turned_keys, head);
    as_bytes = tables.are_coarse() && are_even(key.pairs, key.codes.channels);
    for (int i = 0; i < q.rows; ++i) as_bytes = as_bytes && are_coarse(q.x + i * r.head_dim, key.width, tables);
    still = as_bytes ? plan.still[head % key.codebook.heads] : key.pairs;
    for (int i = 0; i < key.pairs; ++i) factors[i] = key.factor * tables.units()[i] * (as_bytes && i < still ? kTurnedUnit : 1);
    if (!as_bytes) return;
    for (int i = 0; i < q.rows; ++i) scale_to_bytes(q.x + i * r.head_dim, key.pairs, factors, scaled, i);
    std::fill_n(factors, key.pairs, 1.0f);
  }
};

// H rows of queries, turned back by a page's angles, as bytes, for keys that are kTurnedUnit (byte - 128), rounded down, in
// pairs before `still`, which were turned, and byte - kBias in the others.
template <int H>
inline void round_turned_to_bytes(const ScaledQueries& x, const float* cos, const float* sin, int pairs, int still,
                                  TurnedQueries& q, int row) {
  // packing leaves, as words, four a and their four b in turn
  const V quads = _mm512_setr_epi32(0x0a080200, 0x0e0c0604, 0x1a181210, 0x1e1c1614, 0x2a282220, 0x2e2c2624, 0x3a383230,
                                    0x3e3c3634, 0, 0, 0, 0, 0, 0, 0, 0);
  F offsets[H];
  float offset[H];
  repeat<H>([&](auto h) { offsets[h] = set(0); });
  for (int i = 0; i < pairs; i += kLanes) {
    const __mmask16 are_still = __mmask16(~0u << std::clamp(still - i, 0, kLanes));
    const F bias{_mm512_mask_mov_ps(_mm512_set1_ps(-127.5f), are_still, _mm512_set1_ps(-kBias))};
    const F c = load(cos + i), s = load(sin + i);
    repeat<H>([&](auto h) {
      const F x0 = load(x.x[row + h][0] + i), x1 = load(x.x[row + h][1] + i);
      const I a = to_int(fma(x0, c, x1 * s)), b = to_int(x1 * c - x0 * s);
      offsets[h] = fma(to_float(a + b), bias, offsets[h]);
      const B bytes = lookup(B{_mm512_packs_epi32(a.v, b.v)}, B{quads});
      _mm256_store_si256(reinterpret_cast<__m256i*>(q.bytes[row + h] + i / 2), _mm512_castsi512_si256(bytes.v));
    });
  }
  sums_of<H>(offsets, offset);
  repeat<H>([&](auto h) {
    if (pairs % kMatrixPairs) std::fill_n(q.bytes[row + h] + pairs / 2, kMatrixPairs / 4, 0);  // of sixteen quads
    q.unit[row + h] = 256 * x.unit[row + h], q.offset[row + h] = q.unit[row + h] * offset[h];
  });
}

// Everything that scores of keys before the rotary embedding are made of.
struct TurnedKeys {
  const Codes& codes;
  const Tables& tables;
  int channels, pairs;
  const V *word_angles, *byte_angles;
  const TurnedQueries* queries;  // of each page

  const TurnedQueries& queries_of(int vector) const { return queries[vector * kVector / codes.page_size]; }
  // Of a vector's tokens for a pair; those of the next pair lie `next` behind.
  const V* words_of(int vector, int pair) const { return word_angles + at(vector, pair) * kWordAngles; }
  const V* bytes_of(int vector, int pair) const { return byte_angles + at(vector, pair) * kByteAngles; }
  size_t next() const { return codes.page_size / kVector; }

 private:
  size_t at(int vector, int pair) const { return pair * next() + vector % next(); }
};

// Codes of vector v for pair i, and of those after it up to `end`.
struct PairCodes {
  Index x, y;
  int end;

  [[gnu::always_inline]] PairCodes(const TurnedKeys& keys, int v, int i)
      : x(at(keys, v, i / keys.channels)), y(at(keys, v, (i + keys.pairs) / keys.channels)),
        end(std::min((i / keys.channels + 1) * keys.channels,
                     ((i + keys.pairs) / keys.channels + 1) * keys.channels - keys.pairs)) {}

 private:
  [[gnu::always_inline]] static Index at(const TurnedKeys& keys, int v, int group) {
    return Index(load_v(keys.codes.from[v] + group * keys.codes.stride));
  }
};

// Channels x and y, turned by an angle: p and q.
struct Turned {
  V p, q;

  [[gnu::always_inline]] Turned(V x, V y, V cos, V sin)
      : p(_mm512_sub_epi16(_mm512_mulhrs_epi16(x, cos), _mm512_mulhrs_epi16(y, sin))),
        q(_mm512_add_epi16(_mm512_mulhrs_epi16(y, cos), _mm512_mulhrs_epi16(x, sin))) {}
};

// sums[h][tokens] += channels i and i + pairs, turned, times those of queries, for pairs [first, last) and H rows from
// `row` on; the first pairs begin the sums.
template <bool kFine, int H>
[[gnu::noinline]] void score_pairs(const TurnedKeys& keys, int first, int last, int row, int32_t* sums, Fetch& fetch) {
  const Codes& codes = keys.codes;
  const int pairs = keys.pairs;
  for (int v = 0; v < codes.vectors; ++v, sums += kVector) {
    const int32_t(*q)[kColumns / 2] = keys.queries_of(v).words + row;
    const V* angle = keys.words_of(v, first);
    fetch.steps(last - first);
    V acc[H][4];
    repeat<H>([&](auto h) {
      repeat<4>([&](auto i) { acc[h][i] = first ? load_v(sums + h * kTile + i * kLanes) : _mm512_setzero_si512(); });
    });
    for (int i = first; i < last;) {
      const PairCodes of(keys, v, i);
      const int end = std::min(last, of.end);
      for (; i < end; ++i, angle += keys.next() * kWordAngles) {
        const Words x = Words::of<kFine>(keys.tables, i, of.x), y = Words::of<kFine>(keys.tables, i + pairs, of.y);
        const Turned even(x.even, y.even, angle[0], angle[2]), odd(x.odd, y.odd, angle[1], angle[3]);
        const V key[4] = {_mm512_unpacklo_epi16(even.p, even.q), _mm512_unpackhi_epi16(even.p, even.q),
                          _mm512_unpacklo_epi16(odd.p, odd.q), _mm512_unpackhi_epi16(odd.p, odd.q)};
        repeat<H>([&](auto h) {
          const V number = _mm512_set1_epi32(q[h][i]);
          repeat<4>([&](auto j) { acc[h][j] = dot_words(acc[h][j], key[j], number); });
        });
      }
    }
    repeat<H>([&](auto h) { repeat<4>([&](auto i) { _mm512_storeu_si512(sums + h * kTile + i * kLanes, acc[h][i]); }); });
  }
}

// What codes of 64 tokens point to in pairs i and i + 1: channels i, i + pairs, i + 1 and i + 1 + pairs.
struct PairEntries {
  V x, y, x2, y2;

  [[gnu::always_inline]] PairEntries(const TurnedKeys& keys, const PairCodes& of, int i) {
    const uint8_t *x_table = keys.tables.biased(i), *y_table = keys.tables.biased(i + keys.pairs);
    x = of.x.look_up(x_table), y = of.y.look_up(y_table);
    x2 = of.x.look_up(x_table + kEntries), y2 = of.y.look_up(y_table + kEntries);
  }
};

// Keys of 64 tokens in two pairs of channels, turned, as unsigned bytes: a, a', b, b' of 16 tokens in each register, of four
// from each sixteen. kStill: of pairs that hardly turn within a page. `angle`: of the first pair; those of the second lie
// `next` behind it.
template <bool kStill>
struct TurnedBytes {
  V tokens[4];

  [[gnu::always_inline]] TurnedBytes(const PairEntries& of, const V* angle, size_t next) {
    if constexpr (kStill) {
      put(0, _mm512_unpacklo_epi8(of.x, of.x2), _mm512_unpacklo_epi8(of.y, of.y2));
      put(2, _mm512_unpackhi_epi8(of.x, of.x2), _mm512_unpackhi_epi8(of.y, of.y2));
    } else {
      const V low = _mm512_unpacklo_epi8(of.x, of.y), low2 = _mm512_unpacklo_epi8(of.x2, of.y2);
      const V high = _mm512_unpackhi_epi8(of.x, of.y), high2 = _mm512_unpackhi_epi8(of.x2, of.y2);
      const V* angle2 = angle + next;
      put(0, both(low, low2, angle, angle2), both(low, low2, angle + 2, angle2 + 2));
      put(2, both(high, high2, angle + 1, angle2 + 1), both(high, high2, angle + 3, angle2 + 3));
    }
  }

 private:
  [[gnu::always_inline]] void put(int at, V p, V q) {
    tokens[at] = _mm512_unpacklo_epi16(p, q), tokens[at + 1] = _mm512_unpackhi_epi16(p, q);
  }
  // Words that an angle and its bias make of channels, both over 128, side by side as bytes.
  [[gnu::always_inline]] static V both(V x, V x2, const V* angle, const V* angle2) {
    const V p = _mm512_sub_epi16(_mm512_maddubs_epi16(x, angle[0]), angle[4]);
    const V p2 = _mm512_sub_epi16(_mm512_maddubs_epi16(x2, angle2[0]), angle2[4]);
    const V high = _mm512_set1_epi16(int16_t(0xff00));
    return _mm512_ternarylogic_epi32(_mm512_srli_epi16(p, 7), _mm512_add_epi16(p2, p2), high, 0xd8);
  }
};

// The same with bytes, two pairs at a time, for an even first and last pair. What is looked up waits for the next step:
// permutes then run beside the products of the step before.
template <bool kStill, int H>
[[gnu::noinline]] void score_byte_pairs(const TurnedKeys& keys, int first, int last, int row, int32_t* sums, Fetch& fetch) {
  const Codes& codes = keys.codes;
  const size_t next = keys.next() * kByteAngles;
  PairCodes of(keys, 0, first);
  PairEntries entries(keys, of, first);
  for (int v = 0; v < codes.vectors; ++v, sums += kVector) {
    const int32_t(*queries)[kColumns / 4] = keys.queries_of(v).bytes + row;
    const V* angle = keys.bytes_of(v, first);
    fetch.steps(last - first);
    V acc[H][4];
    repeat<H>([&](auto h) {
      repeat<4>([&](auto i) { acc[h][i] = first ? load_v(sums + h * kTile + i * kLanes) : _mm512_setzero_si512(); });
    });
    for (int i = first; i < last; i += 2, angle += 2 * next) {
      const TurnedBytes<kStill> key(entries, angle, next);
      const bool ends = i + 2 == last;  // then those of the next vector; after the last one in vain
      const int ahead = ends ? first : i + 2;
      if (ends || ahead == of.end) of = PairCodes(keys, std::min(v + ends, codes.vectors - 1), ahead);
      entries = PairEntries(keys, of, ahead);
      repeat<H>([&](auto h) {
        const V number = _mm512_set1_epi32(queries[h][i / 2]);
        repeat<4>([&](auto j) { acc[h][j] = dot_bytes(acc[h][j], key.tokens[j], number); });
      });
    }
    repeat<H>([&](auto h) { repeat<4>([&](auto i) { _mm512_storeu_si512(sums + h * kTile + i * kLanes, acc[h][i]); }); });
  }
}

// Keys of vector v in pairs [first, last), four times 16 tokens: [4][16 quads of channels][16 tokens].
struct MatrixKeys { alignas(64) uint8_t tokens[4][kMatrixRows][kMatrixBytes]; };

template <bool kStill>
[[gnu::noinline]] void put_turned_bytes(const TurnedKeys& keys, int v, int first, int last, int quad, MatrixKeys& to) {
  const V* angle = keys.bytes_of(v, first);
  const size_t next = keys.next() * kByteAngles;
  for (int i = first; i < last;) {
    const PairCodes of(keys, v, i);
    const int end = std::min(last, of.end);
    for (; i < end; i += 2, angle += 2 * next, ++quad) {
      const TurnedBytes<kStill> key(PairEntries(keys, of, i), angle, next);
      repeat<4>([&](auto j) { _mm512_store_si512(to.tokens[j][quad], key.tokens[j]); });
    }
  }
}

// Sums as score_byte_pairs leaves them, of all pairs and up to 16 rows, by the matrix unit.
[[gnu::noinline]] inline void score_by_matrix(const TurnedKeys& keys, int still, int row, int32_t (*sums)[kTile],
                                              MatrixKeys& room, Fetch& fetch) {
  for (int v = 0; v < keys.codes.vectors; ++v) {
    const int32_t* queries = keys.queries_of(v).bytes[row];
    repeat<4>([&](auto j) { Matrix::zero<j()>(); });
    for (int first = 0; first < keys.pairs; first += kMatrixPairs, queries += kMatrixRows) {
      const int last = std::min(first + kMatrixPairs, keys.pairs), turn = std::clamp(still, first, last);
      fetch.steps(last - first);
      put_turned_bytes<false>(keys, v, first, turn, 0, room);
      put_turned_bytes<true>(keys, v, turn, last, (turn - first) / 2, room);
      Matrix::load<4>(queries, sizeof keys.queries->bytes[0]);
      repeat<4>([&](auto j) {
        Matrix::load<5>(room.tokens[j], kMatrixBytes);
        Matrix::dot<j(), 4, 5>();
      });
    }
    repeat<4>([&](auto j) { Matrix::store<j()>(sums[row] + v * kVector + j * kLanes, sizeof sums[0]); });
  }
}

// Sums of 64 tokens as scores, dealt. Bytes were unpacked to four neighbours of each sixteen tokens in a register, words to
// four even ones of each sixteen in the first two, then to four odd ones.
inline void put_turned(const int32_t* sums, bool as_bytes, float unit, float offset, float* out) {
  V x[4], y[4];
  repeat<4>([&](auto i) { y[i] = load_v(sums + i * kLanes); });
  if (as_bytes) {
    transpose_dwords(y, x);
  } else {
    const auto every_second = [](V a, V b, auto odd) {
      return _mm512_castps_si512(_mm512_shuffle_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), odd() ? 0xdd : 0x88));
    };
    repeat<4>([&](auto i) { x[i] = every_second(y[i % 2 * 2], y[i % 2 * 2 + 1], std::bool_constant<(i >= 2)>()); });
  }
  repeat<4>([&](auto i) { store(out + i * kLanes, fma(to_float(I{x[i]}), set(unit), set(offset))); });
}

}  // namespace bitkv::BITKV_ISA
