// Pages as float32, for whatever has no kernel of its own: codes, then linear maps, then the rotary embedding.
//
// No include guard: attend.h includes this once.

namespace bitkv::BITKV_ISA {

// Cosines and sines of every place in a page, for keys that are kept before the rotary embedding. Queries are
// turned back to a page's middle, from which angles are smallest, so that one table serves all pages.
struct Turns {
  int pairs = 0, page_size = 0;
  std::vector<float> inv_freq, cos, sin;        // [page_size][pairs]
  std::vector<double> page_cos, page_sin;       // of a whole page: from one to the next

  int middle() const { return page_size / 2; }

  // Whether anything has changed.
  bool make(const Side& key, int size) {
    const bool same = pairs == key.pairs && page_size == size && std::equal(inv_freq.begin(), inv_freq.end(), key.inv_freq);
    if (same) return false;
    pairs = key.pairs, page_size = size;
    inv_freq.assign(key.inv_freq, key.inv_freq + pairs);
    cos.resize(size_t(pairs) * size), sin.resize(cos.size());
    page_cos.resize(pairs), page_sin.resize(pairs);
    for (int i = 0; i < pairs; ++i) {
      for (int t = 0; t < size; ++t) {
        const double angle = (t - middle()) * double(inv_freq[i]);
        cos[size_t(t) * pairs + i] = float(std::cos(angle)), sin[size_t(t) * pairs + i] = float(std::sin(angle));
      }
      page_cos[i] = std::cos(double(size) * inv_freq[i]), page_sin[i] = std::sin(double(size) * inv_freq[i]);
    }
    return true;
  }
};

// The angles of a page's middle, stepped from page to page: in double they stay exact for millions.
struct Angle {
  double cos[kColumns / 2], sin[kColumns / 2];

  void start(const Turns& turns, int64_t token) {
    for (int i = 0; i < turns.pairs; ++i) {
      cos[i] = std::cos(double(token) * turns.inv_freq[i]), sin[i] = std::sin(double(token) * turns.inv_freq[i]);
    }
  }
  void next_page(const Turns& turns) {
    for (int i = 0; i < turns.pairs; ++i) {
      const double c = cos[i], s = sin[i], pc = turns.page_cos[i], ps = turns.page_sin[i];
      cos[i] = c * pc - s * ps, sin[i] = s * pc + c * ps;
    }
  }
  // Times the factor of each pair, in float32; zeros up to whole vectors.
  void scaled(int pairs, const float* factors, float* c, float* s) const {
    for (int i = 0; i < pairs; ++i) c[i] = factors[i] * float(cos[i]), s[i] = factors[i] * float(sin[i]);
    for (int i = pairs; i % kLanes; ++i) c[i] = s[i] = 0;
  }
  // Rows of queries turned back to the page, times the factor of each pair.
  void turn_back(const float* x, int rows, int pairs, int dim, const float* factors, float* out) const {
    float c[kColumns / 2], s[kColumns / 2];
    scaled(pairs, factors, c, s);
    for (int row = 0; row < rows; ++row, x += dim, out += dim) {
      int i = 0;
      for (; i + kLanes <= pairs; i += kLanes) {
        const F a = load(x + i), b = load(x + pairs + i), ci = load(c + i), si = load(s + i);
        store(out + i, fma(a, ci, b * si));
        store(out + pairs + i, b * ci - a * si);
      }
      for (; i < pairs; ++i) {
        const float a = x[i], b = x[pairs + i];
        out[i] = a * c[i] + b * s[i], out[pairs + i] = b * c[i] - a * s[i];
      }
      std::copy(x + 2 * pairs, x + dim, out + 2 * pairs);
    }
  }
};

// Tokens [count][dim] turned by their places in the page.
inline void turn(float* x, int dim, const Turns& turns) {
  const int pairs = turns.pairs;
  for (int t = 0; t < turns.page_size; ++t, x += dim) {
    const float *cos = &turns.cos[size_t(t) * pairs], *sin = &turns.sin[size_t(t) * pairs];
    int i = 0;
    for (; i + kLanes <= pairs; i += kLanes) {
      const F c = load(cos + i), s = load(sin + i), a = load(x + i), b = load(x + pairs + i);
      store(x + i, a * c - b * s);
      store(x + pairs + i, fma(b, c, a * s));
    }
    for (; i < pairs; ++i) {
      const float a = x[i], b = x[pairs + i];
      x[i] = a * cos[i] - b * sin[i], x[pairs + i] = b * cos[i] + a * sin[i];
    }
  }
}

// --- codes as float32 -----------------------------------------------------------------------------

// The indices of a group's tokens.
inline void unpack_codes(const CodePart& part, const uint8_t* data, int g, int32_t* codes) {
  std::fill_n(codes, part.page_size, 0);
  part.each_plane([&](int bits, int shift, size_t begin) {
    const int width = part.page_size * bits / 8, mask = (1 << bits) - 1;
    const uint8_t* from = data + begin + size_t(g) * width;
    if (bits == 8) {
      for (int t = 0; t < width; ++t) codes[t] |= from[t] << shift;
      return;
    }
    for (int j = 0; j < 8 / bits; ++j) {
      for (int w = 0; w < width; ++w) codes[j * width + w] |= ((from[w] >> (j * bits)) & mask) << shift;
    }
  });
}

// Calls fn with a constant number of channels where it is a usual one: loops over it are then no loops.
template <class Fn>
inline void by_channels(int channels, const Fn& fn) {
  switch (channels) {
    case 2: return fn(std::integral_constant<int, 2>());
    case 4: return fn(std::integral_constant<int, 4>());
    case 8: return fn(std::integral_constant<int, 8>());
    default: return fn(channels);
  }
}

// The tokens [page_size][width] of a page.
inline void decode_codes(const Side& side, const uint8_t* data, int head, float* out) {
  const CodePart& part = side.codes;
  int32_t codes[kColumns];
  for (int g = 0; g < part.groups(); ++g) {
    const float* entries = side.codebook.of(head, g);
    unpack_codes(part, data, g, codes);
    float* to = out + g * part.channels;
    by_channels(part.channels, [&](auto channels) {
      for (int t = 0; t < part.page_size; ++t, to += part.width) {
        std::memcpy(to, entries + size_t(codes[t]) * channels, channels * sizeof(float));
      }
    });
  }
  if (part.scales == 0) return;
  float scale[kColumns], zero[kColumns] = {};
  for (int t = 0; t < part.page_size; t += kLanes) {
    store(scale + t, load_half(part.scale(data) + t));
    if (part.scales == 2) store(zero + t, load_half(part.zero_point(data) + t));
  }
  for (int t = 0; t < part.page_size; ++t) {
    float* x = out + t * part.width;
    for (int c = 0; c < part.width; c += kLanes) store(x + c, fma(load(x + c), set(scale[t]), set(zero[t])));
  }
}

// Sixteen neighbouring columns of the sixteen rows of a block, a vector a column.
inline void load_square(const Half& part, const uint8_t* data, int block, int column, F (&x)[kLanes]) {
  const uint8_t* p = data + block * part.block_bytes;
  if (part.is_raw) {
    const int size = part.bits / 8;
    for (int i = 0; i < kLanes; ++i) {
      const uint8_t* at = p + (column + i) * kLanes * size;
      x[i] = size == 4 ? load(reinterpret_cast<const float*>(at)) : load(reinterpret_cast<const uint16_t*>(at), part.dtype);
    }
    return;
  }
  const int per_vector = 32 / part.bits;
  const bool in_tail = column >= part.vectors * per_vector;
  for (int i = 0; i < kLanes; ++i) {
    const int at = in_tail ? column - part.vectors * per_vector + i : (column + i) % per_vector;
    const uint8_t* word = in_tail ? data + part.tail_at + (block / 2) * 64 : p + (column + i) / per_vector * 64;
    const int position = at / 4 + (in_tail ? 4 * (block % 2) : 0);
    x[i] = byte_to_float(bits_at(load_bytes(word), position * part.bits, uint8_t((1 << part.bits) - 1)), at % 4);
  }
  for (int i = 0; i < kLanes; ++i) {  // scales of rows (tokens) or of columns
    const int row = block * kLanes, c = column + i;
    if (part.row_scales) {
      const int at = c / part.group * part.rows + row;
      x[i] = fma(x[i], load_half(part.scales(data) + at), load_half(part.zeros(data) + at));
    } else {
      const ColumnScales of = part.of_columns(data, row / part.group);
      float scale[kLanes], zero[kLanes];
      store(scale, load_half(of.scale + column)), store(zero, load_half(of.zero + column));
      x[i] = fma(x[i], set(scale[i]), set(zero[i]));
    }
  }
}

// Keys [tokens][channels] of a page; rows are tokens.
inline void decode_affine_keys(const Half& part, const uint8_t* data, float* out) {
  for (int block = 0; block < part.blocks; ++block) {
    for (int c = 0; c < part.columns; c += kLanes) {
      F x[kLanes];
      load_square(part, data, block, c, x);
      transpose(x);
      for (int i = 0; i < kLanes; ++i) store(out + (block * kLanes + i) * part.columns + c, x[i]);
    }
  }
}

// --- linear maps ----------------------------------------------------------------------------------

inline const float* restore_of(const Side& side, int head, int dim) {
  return side.restore + size_t(head % side.restore_heads) * dim * side.width;
}

// out = restore^T x, for queries that meet numbers of pages.
inline void map_back(const Side& side, int head, int dim, const float* x, float* out) {
  const float* restore = restore_of(side, head, dim);
  std::fill_n(out, side.width, 0.0f);
  for (int d = 0; d < dim; ++d, restore += side.width) {
    const F xd = set(x[d]);
    for (int w = 0; w < side.width; w += kLanes) store(out + w, fma(load(restore + w), xd, load(out + w)));
  }
}

// out = restore y
inline void map(const Side& side, int head, int dim, const float* y, float* out) {
  const float* restore = restore_of(side, head, dim);
  for (int d = 0; d < dim; ++d, restore += side.width) {
    F total = set(0);
    for (int w = 0; w < side.width; w += kLanes) total = fma(load(restore + w), load(y + w), total);
    out[d] = sum(total);
  }
}

}  // namespace bitkv::BITKV_ISA
