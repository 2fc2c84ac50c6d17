// Online softmax: scores of a tile to weights, for rows of queries that have gathered sums so far.
//
// No include guard: attend.h includes this once.

namespace bitkv::BITKV_ISA {

constexpr float kLog2e = 1.44269504088896f;
constexpr float kNegligible = 0x1p-40f;  // a share of the sum that float32 cannot notice
constexpr float kHeadroom = 0x1p30f;     // weights may grow this far before `high` follows the scores

// take_whole leaves of x what is beside the nearest whole number, which it returns for `scaled`: a * 2^n.
#if defined(BITKV_MATRIX)  // Intel's CPUs are fast at what was made for this; on AMD's it queues with multiplications
inline F take_whole(F& x) {
  const F fraction{_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEAREST_INT)}, whole = x - fraction;
  x = fraction;
  return whole;
}
inline F scaled(F a, F n) { return {_mm512_scalef_ps(a.v, n.v)}; }
#else
inline F take_whole(F& x) {
  x = min(set(127), max(set(-127), x));
  const F n = x + set(0x1.8p23f);  // rounded: no room for a fraction
  x = x - (n - set(0x1.8p23f));
  return n;
}
inline F scaled(F a, F n) { return times_power_of_two(a, n); }
#endif

// 2^x within 2e-7 of it; less than 2^-126 from -126 down. NaN stays.
inline F exp2(F x) {
  const F n = take_whole(x);
  F p = fma(x, set(0.00132647271f), set(0.00967151267f));
  p = fma(p, x, set(0.0555073374f));
  p = fma(p, x, set(0.240222421f));
  p = fma(p, x, set(0.693146978f));
  p = fma(p, x, set(1));
  return scaled(p, n);
}

inline float exp2(float x) {
  float lanes[kLanes];
  store(lanes, exp2(set(x)));
  return lanes[0];
}

// What a set of query rows has gathered so far; the scores are in units of log2.
struct Softmax {
  float high;   // the score that weighs 1: the largest of the first tile, raised when it must be
  float total;  // sum of 2^(score - high)
  float* out;   // sum of 2^(score - high) * value
};

// Query rows of one KV head and sequence: x = q * scale (in units of log2 unless capped), positions.
struct Queries {
  const float* x;          // [rows][head_dim]
  const float* page_x;     // the same as numbers of pages need it: [rows][key.width]
  const int64_t* last;     // newest token that each row sees
  int64_t first_last, last_last;  // the smallest and the largest of these
  Softmax* softmax;
  int rows;
  int stride;              // between the sums of two rows, which have head_dim or value.width numbers
};

inline float largest(const float* score, int count) {
  F top = load(score);
  for (int t = kLanes; t < count; t += kLanes) top = max(top, load(score + t));
  return max(top);
}

// Makes `high` the score that weighs 1.
inline void raise(const Queries& q, Softmax& state, float high) {
  if (high == -INFINITY) return;
  const float decay = state.total > 0 ? exp2(state.high - high) : 0;
  for (int c = 0; c < q.stride; c += kLanes) store(state.out + c, load(state.out + c) * set(decay));
  state.total *= decay;
  state.high = high;
}

inline int undealt(int t) { return t; }  // the place of a token's score, where it is not that of lookup.h

// Hides what rows do not see of `count` tokens from `first` on, whose scores are [rows][kTile]; token t's is at place(t).
template <class Place>
inline void hide(const AttendRequest& r, const Queries& q, int64_t first, int count, int padded, const Place& place, Scratch& s) {
  if (first + padded - 1 <= q.first_last && count == padded && first > q.last_last - r.window) return;  // most pages
  for (int i = 0; i < q.rows; ++i) {
    float* score = s.scores[i];
    const int64_t end = std::clamp<int64_t>(q.last[i] + 1 - first, 0, count);
    const int64_t begin = std::clamp<int64_t>(q.last[i] + 1 - r.window - first, 0, end);
    for (int64_t t = 0; t < begin; ++t) score[place(int(t))] = -INFINITY;
    for (int64_t t = end; t < padded; ++t) score[place(int(t))] = -INFINITY;
  }
}

inline void cap(const AttendRequest& r, float* score, int count) {
  for (int t = 0; t < count; t += kLanes) {
    const F y = min(load(score + t) * set(2 * kLog2e / r.softcap), set(60));
    const F tanh = set(1) - set(2) / (exp2(y) + set(1));
    store(score + t, tanh * set(r.softcap * kLog2e));
  }
}

// Scores of H rows to weights relative to `high`, whose sums go to `total`. With `values`, whose scales are
// at `data`, units are found on the way for weights times scales.
template <int H>
inline void weigh(const Queries& q, int row, int count, const Half* values, const uint8_t* data, float* total, Scratch& s) {
  F totals[H];
  float high[H];
  repeat<H>([&](auto h) { totals[h] = set(0); });
  for (int h = 0; h < H; ++h) high[h] = std::max(q.softmax[row + h].high, -FLT_MAX);  // -inf: nothing seen yet
  const auto weight = [&](int h, int t) {
    const F p = exp2(load(s.scores[row + h] + t) - set(high[h]));
    store(s.weights[row + h] + t, p);
    totals[h] = totals[h] + p;
    return p;
  };
  if (values) {
    with_rule<true>(*values, [&](auto rule) {
      using Rule = decltype(rule);
      const auto top_of = [&](int t, int end, F (&top)[H], F (&squares)[H]) {
        for (; t < end; t += kLanes) {
          const F scale = largest_scales(values->scales(data), values->groups, values->columns, t);
          repeat<H>([&](auto h) {
            const F y = weight(h, t) * scale;
            top[h] = max(top[h], Rule::size(y));
            squares[h] = fma(y, y, squares[h]);
          });
        }
      };
      find_units<Rule, H>(count, square_of_group(values->groups), row, s.of_weights, top_of);
    });
  } else {
    for (int t = 0; t < count; t += kLanes) repeat<H>([&](auto h) { weight(h, t); });
  }
  sums_of<H>(totals, total);
}

// Turns scores into weights; false if all are negligible. See `weigh` and `hide`.
template <class Place>
inline bool soften(const AttendRequest& r, const Queries& q, int64_t first, int count, const Half* values,
                   const uint8_t* data, const Place& place, Scratch& s) {
  const int padded = (count + kLanes - 1) / kLanes * kLanes;
  for (int i = 0; r.softcap > 0 && i < q.rows; ++i) cap(r, s.scores[i], padded);
  hide(r, q, first, count, padded, place, s);
  for (int i = 0; i < q.rows; ++i) {
    if (q.softmax[i].high == -INFINITY) raise(q, q.softmax[i], largest(s.scores[i], padded));
  }
  bool matters = false;
  by_rows(q.rows, [&](int row, auto h) {
    float total[h()];
    weigh<h()>(q, row, padded, values, data, total, s);
    bool raised = false;
    for (int i = 0; i < h(); ++i) {
      if (total[i] <= kHeadroom) continue;
      raise(q, q.softmax[row + i], largest(s.scores[row + i], padded));
      raised = true;
    }
    if (raised) weigh<h()>(q, row, padded, values, data, total, s);
    for (int i = 0; i < h(); ++i) {
      Softmax& state = q.softmax[row + i];
      matters |= total[i] > state.total * kNegligible;
      state.total += total[i];
    }
  });
  return matters;
}

inline bool sees_any(const AttendRequest& r, const Queries& q, int64_t first, int64_t count) {
  return q.last_last >= first && q.first_last - r.window < first + count - 1;
}

}  // namespace bitkv::BITKV_ISA
