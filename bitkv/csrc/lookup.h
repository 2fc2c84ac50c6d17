// Codebooks of at most 256 entries by byte permutes: a table of 256 bytes fills four registers, and a few
// instructions look up 64 tokens' codes in it.
//
// Keys as attention meets them: q . entry is tabulated once an item for each query row and group, in 16 bits,
// or in 8 where that is fine enough. Keys before the rotary embedding: entries as 16-bit integers, turned in
// pairs of channels and multiplied with four rows while they are in registers; where codes are coarse, rounded to
// bytes before that, and slow pairs not turned within a page. Values: entries as bytes times weights as bytes, both
// with a second term where one byte costs too much.
//
// For AVX-512 with VBMI, whose instructions stand in assembly: not every CPU that runs this file has them.
// No include guard: isa_avx512.cpp includes this once, after decode.h.

namespace bitkv::BITKV_ISA {

using V = __m512i;

// Room that grows, aligned so that no vector in it crosses a cache line; what it held is lost when it grows.
template <class T>
class Room {
 public:
  ~Room() { ::operator delete(data_, std::align_val_t(64)); }
  Room() = default;
  Room(const Room&) = delete;

  T* of(size_t size) {
    if (size > size_) {
      ::operator delete(data_, std::align_val_t(64));
      data_ = nullptr, size_ = 0;
      data_ = static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t(64)));
      size_ = size;
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
};

constexpr int kEntries = 256;
constexpr int kVector = 64;                      // tokens in a register of codes
constexpr int kTileVectors = kTileTokens / kVector;
constexpr int kPairs = 16;                       // of channels that are turned while sums are in registers
constexpr float kStillAngle = 0.03f;             // in a page, that is as good as none where codes are coarse
constexpr float kLookupShare = 0.09f;            // of quantization's error that a rounding may add
constexpr float kValueShare = 0.06f;             // entries of values, which are off by the same for all tokens

// --- tables of a codebook -------------------------------------------------------------------------

// What is made of a codebook once, head by head: tables of its channels, then numbers of channels.
//   values         bytes [2][width][256]: high and low parts of 256 high + low = (entry - middle) / unit
//   keys           float32 [width][256]
//   turned keys    bytes [2][width][256]: of 256 high + low = entry / unit; low is unsigned. Pairs share a unit.
//                  The high parts are rounded where they are fine enough alone
struct Tables {
  const uint8_t* data;
  int width;
  size_t bytes;  // of a channel's tables

  static size_t bytes_of_tables(TableKind kind) { return kind == TableKind::keys ? 4 * kEntries : 2 * kEntries; }
  static size_t head_bytes(int width, TableKind kind) {
    return size_t(width) * bytes_of_tables(kind) + (3 * size_t(width) + 16) * sizeof(float);
  }
  Tables(const Side& side, TableKind kind, int head)
      : data(side.tables + head % side.codebook.heads * head_bytes(side.width, kind)), width(side.width),
        bytes(bytes_of_tables(kind)) {}

  const float* floats_of(int channel) const { return reinterpret_cast<const float*>(data) + channel * kEntries; }
  const uint8_t* of(int channel) const { return data + channel * kEntries; }
  size_t low() const { return size_t(width) * kEntries; }  // between the parts of a channel
  const float* units() const { return reinterpret_cast<const float*>(data + width * bytes); }
  const float* middles() const { return units() + width; }
  const float* errors() const { return middles() + width; }  // squared, that quantization makes, at least
  float spread() const { return errors()[width]; }      // the variance of entries over that error
  bool is_fine() const { return errors()[width + 1] != 0; }  // whether bytes need their low parts
  // turned keys: whether they may be rounded to bytes when they are turned, and their mean squares in units, summed
  bool are_coarse() const { return errors()[width + 2] != 0; }
  float squares() const { return errors()[width + 3]; }
};

// What a codebook's own cells say of the error of its codes, per channel: a fraction of the squared distance
// between neighbouring entries, which is smaller than what data with tails see.
inline float cell_error(const float* x, int channels, int entries, std::vector<float>& room) {
  room.assign(entries, FLT_MAX);
  if (entries == 1) return 0;
  for (int e = 0; e < entries; ++e) {
    float near = FLT_MAX;
    for (int f = 0; f < entries; ++f) {
      float square = 0;
      for (int c = 0; c < channels; ++c) {
        const float d = x[e * channels + c] - x[f * channels + c];
        square += d * d;
      }
      if (f != e) near = std::min(near, square);
    }
    room[e] = near;
  }
  std::nth_element(room.begin(), room.begin() + entries / 2, room.end());
  // of the densest lattices with so many channels, whose cells are the smallest
  const float cell = channels == 1 ? 0.083f : channels == 2 ? 0.069f : channels <= 4 ? 0.054f : 0.036f;
  return cell * room[entries / 2];
}

// Where the low part is not signed, the high one is the floor.
inline void put_bytes(uint8_t* high_at, uint8_t* low_at, int number, bool low_is_signed) {
  const int low = low_is_signed ? (number + 128) % 256 - 128 : number & 255;
  const int wrapped = low_is_signed && low < -128 ? low + 256 : low;
  *high_at = uint8_t((number - wrapped) / 256), *low_at = uint8_t(wrapped);
}

// The tables of one head.
inline void tabulate_head(const TablesRequest& r, int head) {
  const int width = r.width, channels = r.codebook.channels, entries = r.codebook.entries;
  uint8_t* out = r.out + head * Tables::head_bytes(width, r.kind);
  float* units = reinterpret_cast<float*>(out + width * Tables::bytes_of_tables(r.kind));
  float *middles = units + width, *errors = middles + width;
  std::vector<float> room;
  const auto entry = [&](int e, int c) {  // those beyond the end repeat the first
    return r.codebook.of(head, c / channels)[(e < entries ? e : 0) * channels + c % channels];
  };
  double variance = 0, error = 0, rounding = 0, in_units = 0;
  for (int c = 0; c < width; ++c) {
    float low = entry(0, c), high = low;
    double total = 0, squares = 0;
    for (int e = 0; e < entries; ++e) {
      const float x = entry(e, c);
      low = std::min(low, x), high = std::max(high, x), total += x;
    }
    middles[c] = r.kind == TableKind::values ? (low + high) / 2 : 0;
    for (int e = 0; e < entries; ++e) squares += (entry(e, c) - middles[c]) * (entry(e, c) - middles[c]);
    const float top = std::max({high - middles[c], middles[c] - low, 1e-30f});
    units[c] = r.kind == TableKind::values ? top / 32512 : top / 23000;
    in_units += squares / (entries * units[c] * units[c]);
    errors[c] = c % channels ? errors[c - 1] : cell_error(r.codebook.of(head, c / channels), channels, entries, room);
    variance += squares / entries, error += errors[c], rounding += 65536.0 / 12 * units[c] * units[c];
  }
  errors[width] = float(variance / std::max(error, 1e-30));
  const float share = r.kind == TableKind::values ? kValueShare : kLookupShare;
  const bool is_fine = rounding > share * share * error;
  errors[width + 1] = is_fine;
  errors[width + 2] = 2 * rounding <= share * share * error;
  errors[width + 3] = float(in_units);
  for (int c = 0; c < r.pairs; ++c) units[c] = units[c + r.pairs] = std::max(units[c], units[c + r.pairs]);
  const bool low_is_signed = r.kind == TableKind::values || !is_fine;
  for (int c = 0; c < width; ++c) {
    for (int e = 0; e < kEntries; ++e) {
      const float x = entry(e, c);
      const size_t at = size_t(c) * kEntries + e, low_at = size_t(width) * kEntries + at;
      if (r.kind == TableKind::keys) std::memcpy(out + at * sizeof x, &x, sizeof x);
      else put_bytes(out + at, out + low_at, int(std::nearbyint((x - middles[c]) / units[c])), low_is_signed);
    }
  }
}

size_t tabulate(const TablesRequest& r) {
  if (r.out) parallel_for(r.codebook.heads, r.threads, [&](int head) { tabulate_head(r, head); });
  return r.codebook.heads * Tables::head_bytes(r.width, r.kind);
}

// --- looking up -----------------------------------------------------------------------------------

inline V load_v(const void* p) { return _mm512_loadu_si512(p); }

// acc + sums of four products of unsigned and signed bytes, or of two products of words, in each lane. Copies
// of the sums, because GCC keeps in memory what assembly changes in an array.
inline V dot_bytes(V acc, V numbers, V entries) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(numbers), "v"(entries));
  return acc;
}
inline V dot_words(V acc, V a, V b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
}

// Codes of 64 tokens, and which half of a table each points into.
struct Index {
  V code;
  __mmask64 upper;

  explicit Index(V code) : code(code), upper(_mm512_movepi8_mask(code)) {}

  // What the codes point to in a table of 256 bytes.
  [[gnu::always_inline]] V look_up(const uint8_t* table) const {
    V low = code, high = code;
    asm("vpermi2b %2, %1, %0" : "+v"(low) : "v"(load_v(table)), "v"(load_v(table + 64)));
    asm("vpermi2b %2, %1, %0" : "+v"(high) : "v"(load_v(table + 128)), "v"(load_v(table + 192)));
    return _mm512_mask_blend_epi8(upper, low, high);
  }
};

// Codes of a tile as bytes, 64 tokens a vector: those of group g lie at from[v] + g * stride.
struct Codes {
  const uint8_t* from[kTileVectors];
  size_t stride;
  int page_size, vectors;
};

// A page's codes into a tile of bytes [groups][kTile].
inline void copy_codes(const CodePart& part, const uint8_t* data, uint8_t* out) {
  for (int g = 0; g < part.groups(); ++g, out += kTile) {
    if (part.bits == 8) {
      const uint8_t* from = data + size_t(g) * part.page_size;
      for (int t = 0; t < part.page_size; t += kVector) _mm512_storeu_si512(out + t, load_v(from + t));
      continue;
    }
    int32_t codes[kColumns];
    unpack_codes(part, data, g, codes);
    for (int t = 0; t < part.page_size; ++t) out[t] = uint8_t(codes[t]);
  }
}

// Words in the order that unpacking bytes leaves, as float32 in the order of tokens.
inline void put_words(V low, V high, float unit, float offset, float* out) {
  const V first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  const V tokens[2] = {_mm512_permutex2var_epi64(low, first, high), _mm512_permutex2var_epi64(low, second, high)};
  for (int i = 0; i < 4; ++i) {
    const __m256i half = i % 2 ? _mm512_extracti64x4_epi64(tokens[i / 2], 1) : _mm512_castsi512_si256(tokens[i / 2]);
    const F x{_mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(half))};
    store(out + i * kLanes, fma(x, set(unit), set(offset)));
  }
}

// --- keys as attention meets them -----------------------------------------------------------------

// The tables of a query row: bytes [groups][256], and [groups][256] more for the low parts.
struct RowTables {
  float unit, offset, sum;  // a score is unit * sum of entries + offset; sum: of the query itself
  bool is_wide;
  uint8_t* bytes;
};

// products [H][groups][256] = x . entry, for H query rows x.
template <int H>
inline void multiply_entries(const Side& side, int head, const float* x, float* products) {
  const Tables tables(side, TableKind::keys, head);
  const int channels = side.codes.channels, groups = side.codes.groups();
  for (int g = 0; g < groups; ++g) {
    for (int e = 0; e < kEntries; e += 4 * kLanes) {
      F y[H][4];
      repeat<H>([&](auto h) { repeat<4>([&](auto i) { y[h][i] = set(0); }); });
      for (int c = g * channels; c < (g + 1) * channels; ++c) {
        F entry[4];
        repeat<4>([&](auto i) { entry[i] = load(tables.floats_of(c) + e + i * kLanes); });
        repeat<H>([&](auto h) {
          const F xc = set(x[h * side.width + c]);
          repeat<4>([&](auto i) { y[h][i] = fma(entry[i], xc, y[h][i]); });
        });
      }
      repeat<H>([&](auto h) {
        repeat<4>([&](auto i) { store(products + (h * groups + g) * kEntries + e + i * kLanes, y[h][i]); });
      });
    }
  }
}

// Rounds the products of a row x.
inline void tabulate_row(const Side& side, int head, const float* x, const float* products, RowTables& row) {
  const Tables tables(side, TableKind::keys, head);
  const int groups = side.codes.groups();
  float lows[kWidth], total = 0, widest = 0, error = 0;
  row.offset = row.sum = 0;
  for (int g = 0; g < groups; ++g) {
    F low = set(FLT_MAX), high = set(-FLT_MAX);
    for (int e = 0; e < kEntries; e += kLanes) {
      const F y = load(products + g * kEntries + e);
      low = min(low, y), high = max(high, y);
    }
    lows[g] = -max(set(0) - low);
    const float range = max(high) - lows[g];
    total += range, widest = std::max(widest, range), row.offset += lows[g];
  }
  for (int c = 0; c < side.width; ++c) error += x[c] * x[c] * tables.errors()[c], row.sum += x[c];
  row.unit = std::max(widest / 255, total / 65000);  // sums fit in words
  row.is_wide = float(groups) / 12 * row.unit * row.unit > kLookupShare * kLookupShare * error;
  if (row.is_wide) row.unit = total / 65000;
  const F inverse = set(row.unit > 1e-30f ? 1 / row.unit : 0);
  for (int g = 0; g < groups; ++g) {
    for (int e = 0; e < kEntries; e += kLanes) {
      const I y = to_int((load(products + g * kEntries + e) - set(lows[g])) * inverse);
      uint8_t* to = row.bytes + (row.is_wide ? 2 : 1) * g * kEntries + e;
      const V high = row.is_wide ? _mm512_srli_epi32(y.v, 8) : y.v;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(high));
      if (row.is_wide) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + kEntries), _mm512_cvtepi32_epi8(y.v));
    }
  }
}

// Scores of N vectors of tokens from vector `first` on, for H query rows in bytes.
template <int N, int H>
[[gnu::noinline]] void scan_rows(const Codes& codes, int groups, const RowTables* rows, int first, Fetch& fetch, float* scores) {
  V all[H][N], odd[H][N];  // sums of bytes in words: of all, which wrap around, and of the odd ones
  repeat<H>([&](auto h) { repeat<N>([&](auto v) { all[h][v] = odd[h][v] = _mm512_setzero_si512(); }); });
  for (int g = 0; g < groups; ++g) {
    fetch.steps(N);
    repeat<N>([&](auto v) __attribute__((always_inline)) {
      const Index index(load_v(codes.from[first + v] + g * codes.stride));
      repeat<H>([&](auto h) __attribute__((always_inline)) {
        const V x = index.look_up(rows[h].bytes + g * kEntries);
        all[h][v] = _mm512_add_epi16(all[h][v], x), odd[h][v] = _mm512_add_epi16(odd[h][v], _mm512_srli_epi16(x, 8));
      });
    });
  }
  repeat<H>([&](auto h) {
    repeat<N>([&](auto v) {
      const V even = _mm512_sub_epi16(all[h][v], _mm512_slli_epi16(odd[h][v], 8));
      put_words(_mm512_unpacklo_epi16(even, odd[h][v]), _mm512_unpackhi_epi16(even, odd[h][v]), rows[h].unit, rows[h].offset,
                scores + h * kTile + (first + v) * kVector);
    });
  });
}

// The same for one row in words.
template <int N>
[[gnu::noinline]] void scan_wide_row(const Codes& codes, int groups, const RowTables& row, int first, Fetch& fetch, float* scores) {
  V low[N], high[N];
  repeat<N>([&](auto v) { low[v] = high[v] = _mm512_setzero_si512(); });
  for (int g = 0; g < groups; ++g) {
    const uint8_t* table = row.bytes + g * 2 * kEntries;
    fetch.steps(N);
    repeat<N>([&](auto v) __attribute__((always_inline)) {
      const Index index(load_v(codes.from[first + v] + g * codes.stride));
      const V h = index.look_up(table), l = index.look_up(table + kEntries);
      low[v] = _mm512_add_epi16(low[v], _mm512_unpacklo_epi8(l, h));
      high[v] = _mm512_add_epi16(high[v], _mm512_unpackhi_epi8(l, h));
    });
  }
  repeat<N>([&](auto v) { put_words(low[v], high[v], row.unit, row.offset, scores + (first + v) * kVector); });
}

// Calls scan(first vector, their number as a constant: N or 1).
template <int N, class Fn>
inline void by_vectors(const Codes& codes, const Fn& scan) {
  int v = 0;
  for (; v + N <= codes.vectors; v += N) scan(v, std::integral_constant<int, N>());
  for (; v < codes.vectors; ++v) scan(v, std::integral_constant<int, 1>());
}

// How many of `count` rows go through a tile together.
inline int rows_at_once(const RowTables* row, int count) { return count > 1 && !row[0].is_wide && !row[1].is_wide ? 2 : 1; }

inline void score_codes(const Codes& codes, int groups, const RowTables* rows, int count, Fetch& fetch, float* scores) {
  for (int i = 0; i < count;) {
    const RowTables* row = rows + i;
    float* out = scores + i * kTile;
    const int at_once = rows_at_once(row, count - i);
    if (at_once == 2) by_vectors<4>(codes, [&](int v, auto n) { scan_rows<n(), 2>(codes, groups, row, v, fetch, out); });
    else if (row->is_wide) by_vectors<8>(codes, [&](int v, auto n) { scan_wide_row<n()>(codes, groups, *row, v, fetch, out); });
    else by_vectors<8>(codes, [&](int v, auto n) { scan_rows<n(), 1>(codes, groups, row, v, fetch, out); });
    i += at_once;
  }
}

// --- keys before the rotary embedding -------------------------------------------------------------

// Cosines and sines of places in a page times 2^15, as 16-bit words of even and of odd tokens:
// [pairs][vectors of 64 tokens][cos even, cos odd, sin even, sin odd][32].
inline void turn_table(const Turns& turns, int16_t* out) {
  for (int i = 0; i < turns.pairs; ++i) {
    for (int t = 0; t < turns.page_size; ++t) {
      int16_t* to = out + (size_t(i) * turns.page_size + t / 64 * 64) * 2 + t % 2 * 32 + t % 64 / 2;
      const size_t at = size_t(t) * turns.pairs + i;
      to[0] = int16_t(std::nearbyint(32767 * turns.cos[at])), to[64] = int16_t(std::nearbyint(32767 * turns.sin[at]));
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

// Queries as words.
inline void round_turned_to_words(const float* x, int pairs, const float* units, TurnedQueries& q, int row) {
  F total = set(0), top = set(0);
  for (int i = 0; i < 2 * pairs; i += kLanes) {
    const F y = abs(load(x + i) * load(units + i));
    total = total + y, top = max(top, y);
  }
  // no sum of products may pass 2^31, keys being below 2^15
  const float unit = std::max({sum(total) / 65000, max(top) / 32767, 1e-30f});
  q.unit[row] = unit, q.offset[row] = 0;
  for (int i = 0; i < pairs; i += kLanes) {
    const V a = to_int(load(x + i) * load(units + i) * set(1 / unit)).v;
    const V b = to_int(load(x + pairs + i) * load(units + pairs + i) * set(1 / unit)).v;
    store_int(q.words[row] + i, {_mm512_or_si512(_mm512_and_si512(a, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(b, 16))});
  }
}

// H rows of queries as bytes, for keys that are 256 (byte - 128), and half a byte more where they were turned, which
// rounds them down: those of the pairs before `still`.
template <int H>
inline void round_turned_to_bytes(const float* x, int stride, int pairs, int still, const float* units, TurnedQueries& q, int row) {
  F top[H];
  repeat<H>([&](auto h) { top[h] = set(0); });
  for (int i = 0; i < 2 * pairs; i += kLanes) {
    repeat<H>([&](auto h) { top[h] = max(top[h], abs(load(x + h * stride + i) * load(units + i))); });
  }
  float largest[H], offset[H];
  maxima_of<H>(top, largest);
  F offsets[H];
  repeat<H>([&](auto h) {
    const float unit = std::max(largest[h] / 127, 1e-30f);
    const F inverse = set(1 / unit);
    F all = set(0);
    for (int i = 0; i < pairs; i += kLanes) {
      const I a = to_int(load(x + h * stride + i) * load(units + i) * inverse);
      const I b = to_int(load(x + h * stride + pairs + i) * load(units + pairs + i) * inverse);
      all = fma(to_float(a + b), set(i < still ? -127.5f : -128), all);
      const __m128i low = _mm512_cvtepi32_epi8(a.v), high = _mm512_cvtepi32_epi8(b.v);
      auto* to = reinterpret_cast<__m128i*>(q.bytes[row + h] + i / 2);
      _mm_store_si128(to, _mm_unpacklo_epi16(low, high)), _mm_store_si128(to + 1, _mm_unpackhi_epi16(low, high));
    }
    q.unit[row + h] = 256 * unit, offsets[h] = all;
  });
  sums_of<H>(offsets, offset);
  for (int h = 0; h < H; ++h) q.offset[row + h] = q.unit[row + h] * offset[h];
}

// Everything that scores of keys before the rotary embedding are made of.
struct TurnedKeys {
  const Codes& codes;
  const Tables& tables;
  int channels, pairs;
  const int16_t* turns;
  const TurnedQueries* queries;  // of each page
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
// `row` on.
template <bool kFine, int H>
[[gnu::noinline]] void score_pairs(const TurnedKeys& keys, int first, int last, int row, int32_t* sums, Fetch& fetch) {
  const Codes& codes = keys.codes;
  const int pairs = keys.pairs, per_page = codes.page_size / kVector;
  for (int v = 0; v < codes.vectors; ++v, sums += kVector) {
    const int32_t(*q)[kColumns / 2] = keys.queries[v / per_page].words + row;
    const auto* angle = reinterpret_cast<const V*>(keys.turns + (size_t(first) * codes.page_size + v % per_page * 64) * 2);
    fetch.steps(last - first);
    V acc[H][4];
    repeat<H>([&](auto h) { repeat<4>([&](auto i) { acc[h][i] = load_v(sums + h * kTile + i * kLanes); }); });
    for (int i = first; i < last;) {
      const PairCodes of(keys, v, i);
      const int end = std::min(last, of.end);
      for (; i < end; ++i, angle += codes.page_size / 16) {
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

// The same with bytes, two pairs at a time, for an even first and last pair. kStill: of pairs that hardly turn within a
// page.
template <bool kStill, int H>
[[gnu::noinline]] void score_byte_pairs(const TurnedKeys& keys, int first, int last, int row, int32_t* sums, Fetch& fetch) {
  const Codes& codes = keys.codes;
  const int pairs = keys.pairs, per_page = codes.page_size / kVector;
  const V high = _mm512_set1_epi16(int16_t(0xff00)), sign = _mm512_set1_epi8(char(0x80));
  const auto bytes_of = [&](V low, V other) __attribute__((always_inline)) {  // low bytes of one, high ones of the other
    return _mm512_xor_si512(_mm512_ternarylogic_epi32(low, other, high, 0xd8), sign);
  };
  for (int v = 0; v < codes.vectors; ++v, sums += kVector) {
    const int32_t(*queries)[kColumns / 4] = keys.queries[v / per_page].bytes + row;
    const auto* angle = reinterpret_cast<const V*>(keys.turns + (size_t(first) * codes.page_size + v % per_page * 64) * 2);
    const size_t next = codes.page_size / 16;  // from a pair's angles to the next ones
    fetch.steps(last - first);
    V acc[H][4];
    repeat<H>([&](auto h) { repeat<4>([&](auto i) { acc[h][i] = load_v(sums + h * kTile + i * kLanes); }); });
    for (int i = first; i < last;) {
      const PairCodes of(keys, v, i);
      const int end = std::min(last, of.end);
      for (; i < end; i += 2, angle += 2 * next) {
        const uint8_t *x_table = keys.tables.of(i), *y_table = keys.tables.of(i + pairs);
        V p[2], q[2];  // bytes of both pairs: of even and of odd tokens
        if constexpr (kStill) {
          const V x = of.x.look_up(x_table), x2 = of.x.look_up(x_table + kEntries);
          const V y = of.y.look_up(y_table), y2 = of.y.look_up(y_table + kEntries);
          p[0] = bytes_of(x, _mm512_slli_epi16(x2, 8)), p[1] = bytes_of(_mm512_srli_epi16(x, 8), x2);
          q[0] = bytes_of(y, _mm512_slli_epi16(y2, 8)), q[1] = bytes_of(_mm512_srli_epi16(y, 8), y2);
        } else {
          const Words x(of.x.look_up(x_table)), y(of.y.look_up(y_table));
          const Turned even(x.even, y.even, angle[0], angle[2]), odd(x.odd, y.odd, angle[1], angle[3]);
          const V* a2 = angle + next;
          const Words x2(of.x.look_up(x_table + kEntries)), y2(of.y.look_up(y_table + kEntries));
          const Turned even2(x2.even, y2.even, a2[0], a2[2]), odd2(x2.odd, y2.odd, a2[1], a2[3]);
          p[0] = bytes_of(_mm512_srli_epi16(even.p, 8), even2.p), p[1] = bytes_of(_mm512_srli_epi16(odd.p, 8), odd2.p);
          q[0] = bytes_of(_mm512_srli_epi16(even.q, 8), even2.q), q[1] = bytes_of(_mm512_srli_epi16(odd.q, 8), odd2.q);
        }
        const V key[4] = {_mm512_unpacklo_epi16(p[0], q[0]), _mm512_unpackhi_epi16(p[0], q[0]),
                          _mm512_unpacklo_epi16(p[1], q[1]), _mm512_unpackhi_epi16(p[1], q[1])};
        repeat<H>([&](auto h) {
          const V number = _mm512_set1_epi32(queries[h][i / 2]);
          repeat<4>([&](auto j) { acc[h][j] = dot_bytes(acc[h][j], key[j], number); });
        });
      }
    }
    repeat<H>([&](auto h) { repeat<4>([&](auto i) { _mm512_storeu_si512(sums + h * kTile + i * kLanes, acc[h][i]); }); });
  }
}

// Quarter l of output j is what quarter j of input l was.
inline void transpose_quarters(const V (&x)[4], V (&out)[4]) {
  const V p = _mm512_shuffle_i32x4(x[0], x[1], 0x44), q = _mm512_shuffle_i32x4(x[2], x[3], 0x44);
  const V r = _mm512_shuffle_i32x4(x[0], x[1], 0xee), t = _mm512_shuffle_i32x4(x[2], x[3], 0xee);
  out[0] = _mm512_shuffle_i32x4(p, q, 0x88), out[1] = _mm512_shuffle_i32x4(p, q, 0xdd);
  out[2] = _mm512_shuffle_i32x4(r, t, 0x88), out[3] = _mm512_shuffle_i32x4(r, t, 0xdd);
}

// Sums as words were unpacked: of even tokens, then of odd ones.
inline void put_turned(const int32_t* sums, float unit, float offset, float* out) {
  const V even[2] = {load_v(sums), load_v(sums + 16)}, odd[2] = {load_v(sums + 32), load_v(sums + 48)};
  // register i has, in quarter l, tokens 16 l + 4 i + 0 ... 3
  const V x[4] = {_mm512_unpacklo_epi32(even[0], odd[0]), _mm512_unpackhi_epi32(even[0], odd[0]),
                  _mm512_unpacklo_epi32(even[1], odd[1]), _mm512_unpackhi_epi32(even[1], odd[1])};
  V y[4];
  transpose_quarters(x, y);
  for (int i = 0; i < 4; ++i) store(out + i * kLanes, fma(to_float(I{y[i]}), set(unit), set(offset)));
}

// --- values ---------------------------------------------------------------------------------------

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

// Bytes of a row of weights in steps of largest / steps, shifted right.
inline void put_weights(const float* weights, int tokens, float largest, float steps, int shift, uint8_t* out) {
  const F inverse = set(largest > 1e-30f ? steps / largest : 0);
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
    put_weights(from, tokens, unit.largest, unit.is_coarse ? 65280 : 255, unit.is_coarse ? 8 : 0, out.bytes[i]);
    if (!unit.is_coarse) continue;
    out.row[out.count] = i, out.unit[out.count] = unit.largest / 65280;
    put_weights(from, tokens, unit.largest, 65280, 0, out.bytes[out.count++]);
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
    V entry[C];
    repeat<C>([&](auto c) { entry[c] = index.look_up(table + c * kEntries); });
    repeat<H>([&](auto h) {
      const V weight = load_v(bytes[h] + v * kVector);
      repeat<C>([&](auto c) { acc[c][h] = dot_bytes(acc[c][h], weight, entry[c]); });
    });
  }
  repeat<C>([&](auto c) { repeat<H>([&](auto h) { out[h][c] = acc[c][h]; }); });
}

// Sums of H rows of bytes over all channels into out[row of the bytes]; `part` 1 for the entries' low parts.
template <int H>
[[gnu::noinline]] void scan_values(const Codes& codes, const Tables& tables, int channels, const ByteRows& rows, int row,
                                   int part, Fetch& fetch, float* out, int stride) {
  V acc[H][kLanes];
  for (int c = 0; c < tables.width; c += kLanes) {
    for (int i = 0; i < kLanes;) {
      const int group = (c + i) / channels;
      const uint8_t* table = tables.of(c + i) + part * tables.low();
      const size_t at = group * codes.stride;
      V(*to)[kLanes] = reinterpret_cast<V(*)[kLanes]>(&acc[0][i]);
      const bool two = (c + i + 1) / channels == group && i + 1 < kLanes;
      fetch.steps(codes.vectors);
      if (two) multiply_values<2, H>(codes, table, at, rows.bytes + row, to);
      else multiply_values<1, H>(codes, table, at, rows.bytes + row, to);
      i += 1 + two;
    }
    for (int h = 0; h < H; ++h) {
      float* sums = out + rows.row[row + h] * stride + c;
      const F unit = load(tables.units() + c) * set(rows.unit[row + h] * (part ? 1 : 256));
      store(sums, fma(to_float(I{sums_of_sixteen(acc[h])}), unit, load(sums)));
    }
  }
}

inline void add_values(const Codes& codes, Fetch& fetch, const Tables& tables, int channels, const ByteRows& rows,
                       float* out, int stride) {
  for (int part = 0; part < (tables.is_fine() ? 2 : 1); ++part) {
    const int count = part ? rows.high : rows.count;  // low parts of both are too small to matter
    int row = 0;
    for (; row + 4 <= count; row += 4) scan_values<4>(codes, tables, channels, rows, row, part, fetch, out, stride);
    if (row + 2 <= count) { scan_values<2>(codes, tables, channels, rows, row, part, fetch, out, stride); row += 2; }
    if (row < count) scan_values<1>(codes, tables, channels, rows, row, part, fetch, out, stride);
  }
}

}  // namespace bitkv::BITKV_ISA
