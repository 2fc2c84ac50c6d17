// Quantizing and packing: bitkv/codecs/affine.py and PartFormat.pack, for the vector vocabulary of one
// instruction set.
//
// Sixteen groups are fitted at once, one in each lane, so that sums and extremes run down the lanes and
// never across them. Keys per channel load as they lie; where a group runs along a token, squares of
// 16 x 16 numbers are turned while loading. Min-max bytes equal those of affine.py; searched levels take
// the same steps on numbers measured from the group's mean, which a float32 sum can bear.
//
// No include guard: each isa_*.cpp includes this once, after its simd header.

namespace bitkv::BITKV_ISA {
namespace quantizing {

// The constants of bitkv/codecs/affine.py, which defines the algorithm.
constexpr float kSmallestScale = 0x1p-24f, kLargestHalf = 65504.0f;
constexpr int kRefits = 4;
constexpr float kTailWeight = 0.15f;
constexpr float kLargestGain = 3.0f;

template <int kBits>
constexpr auto clips() {
  if constexpr (kBits == 2) return std::array{0.95f, 0.8f, 0.65f, 0.5f};
  else if constexpr (kBits == 4) return std::array{1.0f, 0.9f, 0.75f};
  else return std::array{1.0f};
}

// Clips that are searched in one pass over a group: as many as the registers hold.
template <int kBits>
constexpr int kTogether = kAccumulators >= 16 ? int(clips<kBits>().size()) : 1;

template <int kBits>
constexpr float kTop = float((1 << kBits) - 1);  // the largest code

inline F clamp(F x, float low, float high) { return min(max(x, set(low)), set(high)); }  // NaN gives low
inline F keep_nan(F x, float low, float high) { return min(set(high), max(set(low), x)); }

// The levels of 16 groups: code c stands for zero + c * scale.
struct Line {
  F scale, zero;
};

// As a page stores it, so that codes are chosen against the numbers they will meet.
inline Line stored(F scale, F zero) {
  return {round_to_half(keep_nan(scale, kSmallestScale, kLargestHalf)),
          round_to_half(keep_nan(zero, -kLargestHalf, kLargestHalf))};
}

// Where the numbers of a page are and which way its groups run.
struct Source {
  const void* x;
  DType dtype;
  int64_t offset, token_stride;  // of the page's first element; of its tokens
  bool turned;                   // lanes are tokens, not channels

  F load(int64_t i) const {
    const F v = dtype == DType::f32 ? BITKV_ISA::load(static_cast<const float*>(x) + i)
                                    : BITKV_ISA::load(static_cast<const uint16_t*>(x) + i, dtype);
    return keep_nan(v, -kLargestHalf, kLargestHalf);
  }

  // Sixteen groups' elements into `tile` [extent][16], saturated.
  void load_tile(int first_lane, int extent, float* tile) const {
    if (!turned) {
      for (int e = 0; e < extent; ++e) store(tile + e * kLanes, load(offset + e * token_stride + first_lane));
      return;
    }
    for (int e = 0; e < extent; e += kLanes) {
      F square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = load(offset + (first_lane + i) * token_stride + e);
      transpose(square);
      for (int i = 0; i < kLanes; ++i) store(tile + (e + i) * kLanes, square[i]);
    }
  }
};

// Tiles that a thread works in; a group's deviations and weights are filled for searched levels only.
struct Tiles {
  float *x, *deviation, *weight;

  explicit Tiles(int extent) {
    const size_t size = size_t(extent) * kLanes;
    x = static_cast<float*>(::operator new(3 * size * sizeof(float), std::align_val_t(64)));
    deviation = x + size, weight = deviation + size;
  }
  ~Tiles() { ::operator delete(x, std::align_val_t(64)); }
  Tiles(const Tiles&) = delete;
};

// Sixteen groups of `size` elements.
struct Groups {
  float* x;  // [size][16], replaced by the codes in the end
  float *deviation, *weight;
  int size;
};

struct Moments {
  F low, high, mean;
  F nan;  // 0, or NaN where the group has one
};

inline Moments moments(const Groups& g) {
  const F first = load(g.x);
  Moments m{first, first, set(0), set(0)};
  for (int e = 0; e < g.size; ++e) {
    const F x = load(g.x + e * kLanes);
    m.low = min(m.low, x);
    m.high = max(m.high, x);
    m.mean = m.mean + (x - first);  // sums of small numbers lose least
    m.nan = fma(x, set(0), m.nan);
  }
  m.mean = fma(m.mean, set(1.0f / float(g.size)), first);
  return m;
}

template <int kBits>
Line fit_minmax(const Moments& m) {
  return stored((m.high - m.low) / set(kTop<kBits>), m.low);
}

// Deviations from the mean; returns the sum of their squares.
inline F measure(const Groups& g, F mean) {
  F sum = set(0);
  for (int e = 0; e < g.size; ++e) {
    const F d = load(g.x + e * kLanes) - mean;
    store(g.deviation + e * kLanes, d);
    sum = fma(d, d, sum);
  }
  return sum;
}

// What each element's error counts (tail_weights; at 1 bit all count alike); returns the weighted mean.
template <int kBits>
F weigh(const Groups& g, F variance) {
  const F alpha = set(kTailWeight) / max(variance, set(1e-30f)), total = set(1.0f / (1 + kTailWeight));
  F sum = set(0);
  for (int e = 0; e < g.size; ++e) {
    const F d = load(g.deviation + e * kLanes);
    if constexpr (kBits == 1) {
      sum = sum + d;
    } else {
      const F w = fma(alpha, d * d, set(1)) * total;
      store(g.weight + e * kLanes, w);
      sum = fma(w, d, sum);
    }
  }
  return sum * set(1.0f / float(g.size));
}

template <int kBits>
F weight_at(const Groups& g, int e) {
  if constexpr (kBits == 1) return set(1);
  else return load(g.weight + e * kLanes);
}

// Nearest codes of N lines at once, a multiplication instead of a division.
template <int kBits, int N>
struct Coder {
  F inverse[N], offset[N];

  explicit Coder(const Line (&lines)[N]) {
    for (int n = 0; n < N; ++n) {
      inverse[n] = set(1) / lines[n].scale;
      offset[n] = set(0) - lines[n].zero * inverse[n];
    }
  }
  F operator()(F x, int n) const { return round(clamp(fma(x, inverse[n], offset[n]), 0, kTop<kBits>)); }
};

// The weighted least-squares line through (code, deviation) for each of N lines.
template <int kBits, int N>
void refit(const Groups& g, F mean_x, Line (&lines)[N]) {
  const Coder<kBits, N> code(lines);
  F codes[N], squares[N], products[N];
  for (int n = 0; n < N; ++n) codes[n] = squares[n] = products[n] = set(0);
  for (int e = 0; e < g.size; ++e) {
    const F x = load(g.deviation + e * kLanes), w = weight_at<kBits>(g, e);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const F c = code(x, n), wc = kBits == 1 ? c : w * c;
      codes[n] = codes[n] + wc;
      if constexpr (kBits > 1) squares[n] = fma(wc, c, squares[n]);
      products[n] = fma(wc, x, products[n]);
    }
  }
  const F share = set(1.0f / float(g.size));
  for (int n = 0; n < N; ++n) {
    if constexpr (kBits == 1) squares[n] = codes[n];
    const F mean_code = codes[n] * share;
    const F variance = squares[n] - mean_code * codes[n];
    const F slope = (products[n] - codes[n] * mean_x) / max(variance, set(1e-6f));
    // unchanged scale where all codes are equal
    const F scale = select_less(set(0.25f) * share, variance, slope, lines[n].scale);
    lines[n].scale = max(scale, set(kSmallestScale));
    lines[n].zero = mean_x - lines[n].scale * mean_code;
  }
}

template <int kBits, int N>
void squared_errors(const Groups& g, const Line (&lines)[N], F (&errors)[N]) {
  const Coder<kBits, N> code(lines);
  for (int n = 0; n < N; ++n) errors[n] = set(0);
  for (int e = 0; e < g.size; ++e) {
    const F x = load(g.deviation + e * kLanes), w = weight_at<kBits>(g, e);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const F miss = fma(code(x, n), lines[n].scale, lines[n].zero - x);
      errors[n] = fma(w * miss, miss, errors[n]);
    }
  }
}

template <int kBits>
struct Search {
  const Groups& g;
  const Moments& m;
  F mean_x;  // weighted, of the deviations
  Line best;
  F best_error;

  Search(const Groups& g, const Moments& m, F variance) : g(g), m(m), mean_x(weigh<kBits>(g, variance)) {
    best = fit_minmax<kBits>(m);
    const Line lines[1] = {{best.scale, best.zero - m.mean}};
    F errors[1];
    squared_errors<kBits>(g, lines, errors);
    best_error = errors[0];
  }

  template <int N>
  void try_clips(const float* clips) {
    const F center = kBits == 1 ? set(0) : (m.low + m.high) * set(0.5f) - m.mean;
    Line lines[N], rounded[N];
    for (int n = 0; n < N; ++n) {
      lines[n].scale = max(set(clips[n]) * (m.high - m.low) / set(kTop<kBits>), set(kSmallestScale));
      lines[n].zero = center - lines[n].scale * set(0.5f * kTop<kBits>);
    }
    for (int i = 0; i < kRefits; ++i) refit<kBits>(g, mean_x, lines);
    for (int n = 0; n < N; ++n) {
      rounded[n] = stored(lines[n].scale, lines[n].zero + m.mean);
      lines[n] = {rounded[n].scale, rounded[n].zero - m.mean};
    }
    F errors[N];
    squared_errors<kBits>(g, lines, errors);
    for (int n = 0; n < N; ++n) {
      best.scale = select_less(errors[n], best_error, rounded[n].scale, best.scale);
      best.zero = select_less(errors[n], best_error, rounded[n].zero, best.zero);
      best_error = select_less(errors[n], best_error, errors[n], best_error);
    }
  }
};

template <int kBits>
Line fit_mse(const Groups& g, const Moments& m, F variance) {
  static constexpr auto kClips = clips<kBits>();
  Search<kBits> search(g, m, variance);
  for (size_t i = 0; i < kClips.size(); i += kTogether<kBits>)
    search.template try_clips<kTogether<kBits>>(&kClips[i]);
  return search.best;
}

// Codes in the place of the numbers, by the division that defines them.
template <int kBits>
void assign(const Groups& g, const Line& line) {
  for (int e = 0; e < g.size; ++e) {
    const F x = load(g.x + e * kLanes);
    store(g.x + e * kLanes, round(clamp((x - line.zero) / line.scale, 0, kTop<kBits>)));
  }
}

// Levels stretched around the mean by var(x) / cov(x, codes * scale); codes stay as they are.
inline Line stretch(const Groups& g, const Moments& m, F squares, const Line& line) {
  F sum = set(0);
  for (int e = 0; e < g.size; ++e) sum = fma(load(g.deviation + e * kLanes), load(g.x + e * kLanes), sum);
  const F covariance = sum * line.scale;
  const F ratio = squares / max(covariance, set(1e-12f));
  const F gain = clamp(select_less(set(1e-12f), covariance, ratio, set(1)), 1, kLargestGain);
  return stored(line.scale * gain, fma(line.zero - m.mean, gain, m.mean));
}

// Fits 16 groups and turns them into codes; what comes back is for the page.
template <int kBits>
Line quantize(const Groups& g, Levels levels) {
  const Moments m = moments(g);
  Line line;
  if (levels == Levels::minmax) {
    line = fit_minmax<kBits>(m);
    assign<kBits>(g, line);
  } else {
    const F squares = measure(g, m.mean);
    line = fit_mse<kBits>(g, m, squares * set(1.0f / float(g.size)));
    assign<kBits>(g, line);
    if (levels == Levels::unbiased) line = stretch(g, m, squares, line);
  }
  // a NaN makes its whole group NaN: 0 * inf - inf
  constexpr float inf = std::numeric_limits<float>::infinity();
  return {select_less(m.nan, set(1), line.scale, set(inf)), select_less(m.nan, set(1), line.zero, set(-inf))};
}

// One part of one page, to be written.
struct Target {
  const Part& part;
  uint8_t* out;

  // The vector that holds 16 columns of 1-bit codes, half of one each.
  uint8_t* vector_of_halves(int block, int column) const {
    const int n = column / 32;
    if (n < part.vectors()) return out + block * part.block_bytes() + n * 64;
    return out + part.blocks() * part.block_bytes() + (block / 2) * 64;
  }

  // Codes of columns `column` to `column + 15` of a block's 16 rows, which are the lanes.
  template <int kBits>
  void put(int block, int column, const F (&codes)[kLanes]) const {
    constexpr int kPositions = kBits > 2 ? 8 / kBits : 4;
    for (int v = 0; v < 4 / kPositions; ++v) {
      F bytes[4];
      for (int k = 0; k < 4; ++k) {
        bytes[k] = codes[v * 4 * kPositions + k];
        for (int p = 1; p < kPositions; ++p)
          bytes[k] = fma(codes[(v * kPositions + p) * 4 + k], set(float(1 << (kBits * p))), bytes[k]);
      }
      const I low = to_int(fma(bytes[1], set(256), bytes[0]));
      const I high = to_int(fma(bytes[3], set(256), bytes[2]));
      const I lanes = low + shift_left(high, 16);
      if constexpr (kBits == 1) {
        uint8_t* vector = vector_of_halves(block, column);
        const bool tail = column / 32 >= part.vectors();
        const bool second = tail ? block % 2 : column / 16 % 2;
        store_int(vector, second ? load_int(vector) + shift_left(lanes, 4) : lanes);
      } else {
        store_int(out + block * part.block_bytes() + (column / part.columns_per_vector() + v) * 64, lanes);
      }
    }
  }

  // A lane block's codes [extent][16]: lanes are rows where rows have scales, else columns.
  template <int kBits>
  void put_tile(int lane_block, int extent, const float* tile) const {
    for (int i = 0; i < extent / kLanes; ++i) {
      F codes[kLanes];
      for (int e = 0; e < kLanes; ++e) codes[e] = load(tile + (i * kLanes + e) * kLanes);
      if (part.row_scales) {
        put<kBits>(lane_block, i * kLanes, codes);
      } else {
        transpose(codes);
        put<kBits>(i, lane_block * kLanes, codes);
      }
    }
  }
};

// Lane blocks `begin` to `end` of a page. A pair of blocks may share vectors, so `begin` is even.
template <int kBits>
void encode_blocks(const Part& part, const Source& source, Levels levels, int begin, int end, uint8_t* out) {
  const int extent = part.row_scales ? part.columns : part.rows;
  const int lanes = part.row_scales ? part.rows : part.columns;
  uint16_t* scales = const_cast<uint16_t*>(part.scales(out));
  uint16_t* zero_points = const_cast<uint16_t*>(part.zero_points(out));
  const Tiles tiles(extent);
  for (int block = begin; block < end; ++block) {
    source.load_tile(block * kLanes, extent, tiles.x);
    for (int i = 0; i < extent / part.group; ++i) {
      const Groups groups{tiles.x + i * part.group * kLanes, tiles.deviation, tiles.weight, part.group};
      const Line line = quantize<kBits>(groups, levels);
      store_half(scales + i * lanes + block * kLanes, line.scale);
      store_half(zero_points + i * lanes + block * kLanes, line.zero);
    }
    Target{part, out}.put_tile<kBits>(block, extent, tiles.x);
  }
}

// Unquantized values of a page, one of its blocks of 16 rows. The caller sees to it that the page's
// dtype is the model's.
template <class T>
void reorder_block(const EncodeRequest& r, const T* x, int block, T* out) {
  const int first = block * kLanes, columns = r.part.columns;
  if (!r.is_key) {
    for (int c = 0; c < columns; ++c)
      std::memcpy(out + c * kLanes, x + c * r.token_stride + first, kLanes * sizeof(T));
    return;
  }
  for (int c = 0; c < columns; ++c)
    for (int i = 0; i < kLanes; ++i) out[c * kLanes + i] = x[(first + i) * r.token_stride + c];
}

// Pages are handed out whole where there are plenty, else by pairs of lane blocks.
struct Slices {
  int blocks, count, pairs;  // a slice has `pairs` pairs

  Slices(const EncodeRequest& r) {
    blocks = (r.part.row_scales || r.part.is_raw() ? r.part.rows : r.part.columns) / kLanes;
    const int all = (blocks + 1) / 2, items = r.pages * r.heads;
    count = items >= 4 * r.threads ? 1 : all;
    pairs = count == 1 ? all : 1;
  }
  int begin(int slice) const { return slice * pairs * 2; }
  int end(int slice) const { return std::min(blocks, begin(slice) + pairs * 2); }
};

inline void encode_slice(const EncodeRequest& r, int page, int head, int begin, int end) {
  const int64_t offset = page * r.page_stride + head * r.head_stride;
  uint8_t* out = r.out + page * r.out_page_stride + head * r.out_head_stride;
  const bool turned = !r.is_key || r.part.row_scales;
  const Source source{r.x, r.dtype, offset, r.token_stride, turned};
  switch (r.part.bits) {
    case 1: return encode_blocks<1>(r.part, source, r.levels, begin, end, out);
    case 2: return encode_blocks<2>(r.part, source, r.levels, begin, end, out);
    case 4: return encode_blocks<4>(r.part, source, r.levels, begin, end, out);
    case 8: return encode_blocks<8>(r.part, source, r.levels, begin, end, out);
    case 16: {
      const uint16_t* x = static_cast<const uint16_t*>(r.x) + offset;
      for (int b = begin; b < end; ++b)
        reorder_block(r, x, b, reinterpret_cast<uint16_t*>(out + b * r.part.block_bytes()));
      return;
    }
    default: {
      const uint32_t* x = static_cast<const uint32_t*>(r.x) + offset;
      for (int b = begin; b < end; ++b)
        reorder_block(r, x, b, reinterpret_cast<uint32_t*>(out + b * r.part.block_bytes()));
    }
  }
}

}  // namespace quantizing

void encode(const EncodeRequest& r) {
  const quantizing::Slices slices(r);
  parallel_for(r.pages * r.heads * slices.count, r.threads, [&](int item) {
    const int slice = item % slices.count, head = item / slices.count % r.heads;
    const int page = item / slices.count / r.heads;
    quantizing::encode_slice(r, page, head, slices.begin(slice), slices.end(slice));
  });
}

}  // namespace bitkv::BITKV_ISA
