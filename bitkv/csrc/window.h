// The hot window: scores and sums over tokens in 16 or 32 bits, as they are stored.
//
// No include guard: attend.h includes this once.

namespace bitkv::BITKV_ISA {

constexpr int kHotTokens = 64;  // of a piece of the hot window, which costs about as much as a page

inline F load_any(const void* p, DType dtype, int64_t index) {
  return dtype == DType::f32 ? load(static_cast<const float*>(p) + index)
                             : load(static_cast<const uint16_t*>(p) + index, dtype);
}

// Calls fn with a loader of sixteen elements of the hot window, from an index on.
template <class Fn>
inline void with_loader(const void* p, DType dtype, const Fn& fn) {
  const auto* halves = static_cast<const uint16_t*>(p);
  switch (dtype) {
    case DType::f16: return fn([=](int64_t i) { return load(halves + i, DType::f16); });
    case DType::bf16: return fn([=](int64_t i) { return load(halves + i, DType::bf16); });
    case DType::f32: return fn([=](int64_t i) { return load(static_cast<const float*>(p) + i); });
  }
}

// scores[i * stride + t] = x[i] . key t of `count`, for H rows, four keys at a time.
template <int H, class Loader>
inline void hot_scores(const Loader& keys, int dim, const float* x, int count, float* scores, int stride) {
  for (int t = 0; t < count; t += 4) {
    F acc[H][4];
    int key[4];
    repeat<4>([&](auto j) { key[j] = std::min(t + j, count - 1) * dim; });
    repeat<H>([&](auto i) { repeat<4>([&](auto j) { acc[i][j] = set(0); }); });
    for (int c = 0; c < dim; c += kLanes) {
      F k[4];
      repeat<4>([&](auto j) { k[j] = keys(key[j] + c); });
      repeat<H>([&](auto i) {
        const F xc = load(x + i * dim + c);
        repeat<4>([&](auto j) { acc[i][j] = fma(k[j], xc, acc[i][j]); });
      });
    }
    repeat<H>([&](auto i) { sums(acc[i], scores + i * stride + t); });
  }
}

// out[i] += weights[i] . values of `count` tokens, for H rows, as many channels at a time as sums fit in registers.
template <int H, class Loader>
inline void hot_values(const Loader& values, int dim, const float (*weights)[kTile], int count, float* out, int stride) {
  constexpr int C = std::max(1, std::min(4, kAccumulators / H));
  const auto sum_channels = [&](int c, auto vectors) {
    F acc[H][vectors()];
    repeat<H>([&](auto i) { repeat<vectors()>([&](auto j) { acc[i][j] = load(out + i * stride + c + j * kLanes); }); });
    for (int t = 0; t < count; ++t) {
      F v[vectors()];
      repeat<vectors()>([&](auto j) { v[j] = values(t * dim + c + j * kLanes); });
      repeat<H>([&](auto i) {
        const F weight = set(weights[i][t]);
        repeat<vectors()>([&](auto j) { acc[i][j] = fma(v[j], weight, acc[i][j]); });
      });
    }
    repeat<H>([&](auto i) { repeat<vectors()>([&](auto j) { store(out + i * stride + c + j * kLanes, acc[i][j]); }); });
  };
  int c = 0;
  for (; c + C * kLanes <= dim; c += C * kLanes) sum_channels(c, std::integral_constant<int, C>());
  for (; c < dim; c += kLanes) sum_channels(c, std::integral_constant<int, 1>());
}

// Calls fn with the first of the rows to take next and their number, a constant: 4 or 1.
template <class Fn>
inline void by_four_rows(int rows, const Fn& fn) {
  int row = 0;
  for (; row + 4 <= rows; row += 4) fn(row, std::integral_constant<int, 4>());
  for (; row < rows; ++row) fn(row, std::integral_constant<int, 1>());
}

// Slots [begin, end) of the hot window, at most kHotTokens, which hold the tokens from `first` on.
inline void attend_hot(const AttendRequest& r, const Queries& q, int64_t offset, int begin, int end, int64_t first,
                       Scratch& s) {
  const int count = end - begin, dim = r.head_dim;
  if (count <= 0 || !sees_any(r, q, first, count)) return;
  offset += int64_t(begin) * dim;
  with_loader(r.hot_k, r.hot_dtype, [&](const auto& load_key) {
    const auto keys = [&](int i) { return load_key(offset + i); };
    by_four_rows(q.rows, [&](int row, auto h) {
      hot_scores<h()>(keys, dim, q.x + row * dim, count, s.scores[row], kTile);
    });
  });
  if (!soften(r, q, first, count, nullptr, nullptr, undealt, s)) return;
  with_loader(r.hot_v, r.hot_dtype, [&](const auto& load_value) {
    const auto values = [&](int i) { return load_value(offset + i); };
    by_four_rows(q.rows, [&](int row, auto h) {
      hot_values<h()>(values, dim, s.weights + row, count, q.softmax[row].out, q.stride);
    });
  });
}

}  // namespace bitkv::BITKV_ISA
