// Attention over entries of codebooks instead of tokens, where registers look nothing up: products of queries with
// entries are added up for each token, and weights of tokens for each entry. Four rows of queries lie side by side, so
// that an index costs a load and an addition for all of them, however many channels share it.
//
// No include guard: attend.h includes this once.

namespace bitkv::BITKV_ISA {

using Quad [[gnu::vector_size(16)]] = float;
struct Four { Quad rows; };

// What a thread keeps for an item.
struct EntryScratch {
  Room<Four> products;  // [quads of rows][groups][entries]
  Room<Four> sums;      // [groups][entries], of one quad
  Four weights[kTileTokens];
};

inline EntryScratch& entry_scratch() {
  static thread_local std::unique_ptr<EntryScratch> scratch;
  if (!scratch) scratch = std::make_unique<EntryScratch>();
  return *scratch;
}

// Whether tokens of an item are worth what entries cost once.
inline bool are_worth(const Side& side, int64_t tokens) { return tokens > side.codebook.entries; }

inline size_t num_entries(const Side& side) { return size_t(side.codes.groups()) * side.codebook.entries; }

// Numbers [rows][count] as [count]. Rows that are missing repeat the first; nobody reads what becomes of them.
inline void lay_side_by_side(const float* x, int stride, int rows, int count, Four* out) {
  const float *a = x, *b = rows > 1 ? x + stride : x, *c = rows > 2 ? x + 2 * stride : x, *d = rows > 3 ? x + 3 * stride : x;
  for (int i = 0; i < count; ++i) out[i].rows = Quad{a[i], b[i], c[i], d[i]};
}

// Calls fn with the first row and the number of rows of each quad.
template <class Fn>
inline void by_quads(int rows, const Fn& fn) {
  for (int row = 0; row < rows; row += 4) fn(row, std::min(4, rows - row));
}

// --- keys -----------------------------------------------------------------------------------------

// Products of rows of queries [rows][width] with all entries.
inline void multiply_by_entries(const Side& key, int head, const float* x, int rows, Four* out) {
  Four y[kWidth];
  lay_side_by_side(x, key.width, rows, key.width, y);
  const int channels = key.codes.channels;
  for (int g = 0; g < key.codes.groups(); ++g) {
    const float* entry = key.codebook.of(head, g);
    by_channels(channels, [&](auto constant) {
      for (int e = 0; e < key.codebook.entries; ++e, ++out, entry += constant) {
        Quad sum{};
        for (int c = 0; c < constant; ++c) sum += y[g * channels + c].rows * entry[c];
        out->rows = sum;
      }
    });
  }
}

// Scores of a page's tokens, which have no scales yet.
inline void add_products(const CodePart& part, const uint8_t* data, const Four* products, int entries, int rows, float* scores) {
  constexpr int kAtOnce = 4;  // groups
  Quad sums[kTokens] = {};
  int32_t codes[kAtOnce][kTokens];
  const int groups = part.groups(), whole = groups / kAtOnce * kAtOnce;
  for (int g = 0; g < whole; g += kAtOnce, products += kAtOnce * entries) {
    for (int j = 0; j < kAtOnce; ++j) unpack_codes(part, data, g + j, codes[j]);
    const Four *p1 = products + entries, *p2 = p1 + entries, *p3 = p2 + entries;
#pragma GCC unroll 4
    for (size_t t = 0; t < size_t(part.page_size); ++t) {
      const auto of = [&](int j) { return uint32_t(codes[j][t]); };
      sums[t] += (products[of(0)].rows + p1[of(1)].rows) + (p2[of(2)].rows + p3[of(3)].rows);
    }
  }
  for (int g = whole; g < groups; ++g, products += entries) {
    unpack_codes(part, data, g, codes[0]);
    for (int t = 0; t < part.page_size; ++t) sums[t] += products[codes[0][t]].rows;
  }
  for (int row = 0; row < rows; ++row) {
    for (int t = 0; t < part.page_size; ++t) scores[row * kTile + t] = sums[t][row];
  }
}

// Scores [rows][page_size] of a page; x: the queries.
inline void score_entries(const Side& key, const uint8_t* data, const Four* products, const float* x, int rows, float* scores) {
  const CodePart& part = key.codes;
  by_quads(rows, [&](int row, int count) {
    const Four* of_rows = products + row / 4 * num_entries(key);
    add_products(part, data, of_rows, key.codebook.entries, count, scores + row * kTile);
  });
  for (int row = 0; part.scales && row < rows; ++row) {
    F sum_x = set(0);
    for (int c = 0; c < key.width; c += kLanes) sum_x = sum_x + load(x + row * key.width + c);
    const F total = set(part.scales == 2 ? sum(sum_x) : 0);
    for (int t = 0; t < part.page_size; t += kLanes) {
      const F zero = part.scales == 2 ? load_half(part.zero_point(data) + t) : set(0);
      float* at = scores + row * kTile + t;
      store(at, fma(load(at), load_half(part.scale(data) + t), zero * total));
    }
  }
}

// Products of an item's queries with all entries.
inline const Four* multiply_by_entries(const Side& key, int head, const Queries& q, EntryScratch& e) {
  const size_t size = num_entries(key);
  Four* products = e.products.of((q.rows + 3) / 4 * size);
  by_quads(q.rows, [&](int row, int rows) {
    multiply_by_entries(key, head, q.page_x + row * key.width, rows, products + row / 4 * size);
  });
  return products;
}

// --- values ---------------------------------------------------------------------------------------

// Weights [rows][kTile] of a page times its scales, and what zero points add to all channels.
inline void scale_page_weights(const CodePart& part, const uint8_t* data, int rows, int width, float* weights, float* out, int stride) {
  for (int row = 0; part.scales && row < rows; ++row, weights += kTile, out += stride) {
    F zeros = set(0);
    for (int t = 0; t < part.page_size; t += kLanes) {
      const F weight = load(weights + t);
      if (part.scales == 2) zeros = fma(weight, load_half(part.zero_point(data) + t), zeros);
      store(weights + t, weight * load_half(part.scale(data) + t));
    }
    const F zero = set(sum(zeros));
    for (int c = 0; part.scales == 2 && c < width; c += kLanes) store(out + c, load(out + c) + zero);
  }
}

// The sum of weights of each entry, over a page.
inline void add_weights(const CodePart& part, const uint8_t* data, const Four* weights, int entries, Four* sums) {
  int32_t codes[kTokens];
  for (int g = 0; g < part.groups(); ++g, sums += entries) {
    unpack_codes(part, data, g, codes);
#pragma GCC unroll 8
    for (size_t t = 0; t < size_t(part.page_size); ++t) sums[uint32_t(codes[t])].rows += weights[t].rows;
  }
}

// out[row][channel] += sums of weights times entries, for N channels of a group from c on.
template <int N>
inline void add_channels(const Four* sums, const float* entry, int entries, int channels, int rows, float* out, int stride) {
  Quad total[N] = {};
  for (int e = 0; e < entries; ++e, entry += channels) {
    repeat<N>([&](auto j) { total[j] += sums[e].rows * entry[j]; });
  }
  for (int row = 0; row < rows; ++row) repeat<N>([&](auto j) { out[row * stride + j] += total[j][row]; });
}

inline void add_entries(const Side& value, int head, const Four* sums, int rows, float* out, int stride) {
  const int channels = value.codes.channels, entries = value.codebook.entries;
  for (int g = 0; g < value.codes.groups(); ++g, sums += entries, out += channels) {
    const float* entry = value.codebook.of(head, g);
    int c = 0;
    for (; c + 4 <= channels; c += 4) add_channels<4>(sums, entry + c, entries, channels, rows, out + c, stride);
    if (c + 2 <= channels) add_channels<2>(sums, entry + c, entries, channels, rows, out + c, stride), c += 2;
    if (c < channels) add_channels<1>(sums, entry + c, entries, channels, rows, out + c, stride);
  }
}

// From scores of pages, whose tokens are those from `first` on, to sums of their values; value(i): that half of page i.
template <class Page>
inline void add_entry_pages(const AttendRequest& r, const Queries& q, const Page& value, int pages, int head, int64_t first,
                            Scratch& s, EntryScratch& e) {
  if (!soften(r, q, first, pages * r.page_size, nullptr, nullptr, undealt, s)) return;
  const CodePart& part = r.value.codes;
  for (int p = 0; p < pages; ++p) {
    scale_page_weights(part, value(p), q.rows, r.value.width, s.weights[0] + p * r.page_size, q.softmax[0].out, q.stride);
  }
  const size_t size = num_entries(r.value);
  Four* sums = e.sums.of(size);
  by_quads(q.rows, [&](int row, int rows) {
    std::fill_n(sums, size, Four{});
    lay_side_by_side(s.weights[row], kTile, rows, pages * r.page_size, e.weights);
    for (int p = 0; p < pages; ++p) {
      add_weights(part, value(p), e.weights + p * r.page_size, r.value.codebook.entries, sums);
    }
    add_entries(r.value, head, sums, rows, q.softmax[row].out, q.stride);
  });
}

}  // namespace bitkv::BITKV_ISA
