// The nearest of a codebook's entries for each of many points: prompts become indices, and k-means runs on it.
//
// Of a squared distance only x . entry - |entry|^2 / 2 differs between entries, so the search is a product of
// matrices whose largest element is kept and whose elements are never stored. Points lie in lanes.
//
// No include guard: each isa_*.cpp includes this once, after its simd header.

namespace bitkv::BITKV_ISA {
namespace searching {

constexpr int kVectors = kAccumulators >= 16 ? 4 : 2;   // of points that are searched for at once
constexpr int kTogether = kAccumulators >= 16 ? 4 : 2;  // entries that meet them at once
constexpr int kPoints = kVectors * kLanes;
constexpr int kTokens = 128;  // of a page, at most
constexpr int kPiece = 2048;  // points of a work item: arranging a codebook costs as much as looking for a few

// A codebook as the search reads it: blocks of kTogether entries [channels][kTogether], then their biases.
struct Entries {
  const float* blocks;
  int channels, count;  // count: of blocks

  static size_t floats(int channels, int entries) {
    return size_t((entries + kTogether - 1) / kTogether) * kTogether * (channels + 1);
  }
};

// Arranges entries [entries][channels]; those that fill up the last block are infinitely far away.
inline void arrange(const float* codebook, int channels, int entries, float* out) {
  for (int e = 0; e < entries; e += kTogether, out += (channels + 1) * kTogether) {
    for (int j = 0; j < kTogether; ++j) {
      const bool real = e + j < entries;
      const float* entry = codebook + size_t(real ? e + j : 0) * channels;
      float square = 0;
      for (int c = 0; c < channels; ++c) {
        out[c * kTogether + j] = entry[c];
        square += entry[c] * entry[c];
      }
      out[channels * kTogether + j] = real ? -0.5f * square : -INFINITY;
    }
  }
}

// The entries nearest to kPoints points, `x` being [channels][stride].
inline void search(const float* x, int stride, const Entries& of, int32_t* out) {
  F best[kVectors], index[kVectors];
  for (int v = 0; v < kVectors; ++v) best[v] = set(-INFINITY), index[v] = set(0);
  const float* block = of.blocks;
  for (int e = 0; e < of.count; ++e) {
    F score[kTogether][kVectors];
    const float* bias = block + of.channels * kTogether;
    repeat<kTogether>([&](auto j) { repeat<kVectors>([&](auto v) { score[j][v] = set(bias[j]); }); });
    for (int c = 0; c < of.channels; ++c, block += kTogether) {
      F xc[kVectors];
      repeat<kVectors>([&](auto v) { xc[v] = load(x + c * stride + v * kLanes); });
      repeat<kTogether>([&](auto j) {
        const F entry = set(block[j]);
        repeat<kVectors>([&](auto v) { score[j][v] = fma(xc[v], entry, score[j][v]); });
      });
    }
    block += kTogether;
    repeat<kTogether>([&](auto j) {
      const F number = set(float(e * kTogether + j));
      repeat<kVectors>([&](auto v) {
        index[v] = select_less(best[v], score[j][v], number, index[v]);
        best[v] = max(best[v], score[j][v]);
      });
    });
  }
  for (int v = 0; v < kVectors; ++v) store_int(out + v * kLanes, to_int(index[v]));
}

// A block of memory aligned for vectors, per thread.
inline float* room(size_t floats) {
  static thread_local std::vector<float> buffer;
  if (buffer.size() < floats) buffer.resize(floats);
  return buffer.data();
}

inline void nearest_item(const NearestRequest& r, int g, int64_t first, int count) {
  const size_t arranged = Entries::floats(r.channels, r.entries);
  float* blocks = room(arranged + size_t(r.channels) * kPoints);
  float* tile = blocks + arranged;
  arrange(r.codebook + size_t(g) * r.entries * r.channels, r.channels, r.entries, blocks);
  const Entries entries{blocks, r.channels, (r.entries + kTogether - 1) / kTogether};
  for (int p = 0; p < count; p += kPoints) {
    const int64_t at = int64_t(g) * r.points + first + p;
    const int here = std::min(kPoints, count - p);
    for (int i = 0; i < kPoints; ++i) {
      const float* point = r.x + (at + std::min(i, here - 1)) * r.channels;
      for (int c = 0; c < r.channels; ++c) tile[c * kPoints + i] = point[c];
    }
    int32_t found[kPoints];
    search(tile, kPoints, entries, found);
    std::copy_n(found, here, r.out + at);
  }
}

// A page's tokens of one head as [width][tokens].
inline void load_turned(const EncodeCodesRequest& r, int64_t offset, float* tile) {
  for (int t = 0; t < r.part.page_size; t += kLanes) {
    for (int c = 0; c < r.part.width; c += kLanes) {
      F square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t at = offset + (t + i) * r.token_stride + c;
        square[i] = r.dtype == DType::f32 ? load(static_cast<const float*>(r.x) + at)
                                          : load(static_cast<const uint16_t*>(r.x) + at, r.dtype);
      }
      transpose(square);
      for (int i = 0; i < kLanes; ++i) store(tile + (c + i) * r.part.page_size + t, square[i]);
    }
  }
}

// The codes of a group's tokens into its planes.
inline void put_codes(const CodePart& part, int g, const int32_t* codes, uint8_t* out) {
  part.each_plane([&](int bits, int shift, size_t begin) {
    const int width = part.page_size * bits / 8, mask = (1 << bits) - 1;
    uint8_t* to = out + begin + size_t(g) * width;
    for (int w = 0; w < width; ++w) {
      int byte = 0;
      for (int j = 0; j < 8 / bits; ++j) byte |= ((codes[j * width + w] >> shift) & mask) << (j * bits);
      to[w] = uint8_t(byte);
    }
  });
}

inline void encode_page(const EncodeCodesRequest& r, const float* arranged, int page, int head) {
  const CodePart& part = r.part;
  const int size = part.page_size;
  float* tile = room(size_t(part.width) * size);
  load_turned(r, page * r.page_stride + head * r.head_stride, tile);
  uint8_t* out = r.out + page * r.out_page_stride + head * r.out_head_stride;
  const size_t floats = Entries::floats(part.channels, r.codebook.entries);
  for (int g = 0; g < part.groups(); ++g) {
    const size_t table = size_t(head % r.codebook.heads) * r.codebook.groups + g % r.codebook.groups;
    const Entries entries{arranged + table * floats, part.channels, (r.codebook.entries + kTogether - 1) / kTogether};
    int32_t codes[kTokens];
    for (int t = 0; t < size; t += kPoints) search(tile + g * part.channels * size + t, size, entries, codes + t);
    put_codes(part, g, codes, out);
  }
}

}  // namespace searching

void encode_codes(const EncodeCodesRequest& r) {
  static thread_local std::vector<float> arranged;
  const Codebook& of = r.codebook;
  const size_t floats = searching::Entries::floats(of.channels, of.entries);
  const int tables = of.heads * of.groups;
  if (arranged.size() < floats * tables) arranged.resize(floats * tables);
  float* data = arranged.data();
  parallel_for(tables, r.threads, [&](int i) {
    searching::arrange(of.of(i / of.groups, i % of.groups), of.channels, of.entries, data + i * floats);
  });
  parallel_for(r.pages * r.heads, r.threads, [&](int item) {
    searching::encode_page(r, data, item / r.heads, item % r.heads);
  });
}

void nearest(const NearestRequest& r) {
  constexpr int size = searching::kPiece;
  const int pieces = int((r.points + size - 1) / size);
  parallel_for(r.groups * pieces, r.threads, [&](int item) {
    const int64_t first = int64_t(item % pieces) * size;
    searching::nearest_item(r, item / pieces, first, int(std::min<int64_t>(size, r.points - first)));
  });
}

}  // namespace bitkv::BITKV_ISA
