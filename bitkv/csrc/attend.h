// Attention over pages and the hot window, for the vector vocabulary of one instruction set: online softmax
// over tiles, the division of a call into items for threads, and their merging.
//
// No include guard: each isa_*.cpp includes this once, after its simd header.

#include "rows.h"
#include "decode.h"
#if defined(BITKV_LOOKUP)
#include "tables.h"
#include "lookup.h"
#include "matrix.h"
#include "turned.h"
#include "values.h"
#endif

namespace bitkv::BITKV_ISA {

constexpr int kHotTokens = 64;     // of a piece of the hot window, which costs about as much as a page
constexpr int kLeastPart = 16;     // pages
constexpr float kLog2e = 1.44269504088896f;
constexpr float kNegligible = 0x1p-40f;  // a share of the sum that float32 cannot notice
constexpr float kHeadroom = 0x1p30f;     // weights may grow this far before `high` follows the scores

// 2^x within 2e-7 of it; 0 from -127 down. NaN stays.
inline F exp2(F x) {
  x = min(set(127), max(set(-127), x));
  const F n = x + set(0x1.8p23f);  // rounded: no room for a fraction
  const F f = x - (n - set(0x1.8p23f));
  F p = fma(f, set(0.00132647271f), set(0.00967151267f));
  p = fma(p, f, set(0.0555073374f));
  p = fma(p, f, set(0.240222421f));
  p = fma(p, f, set(0.693146978f));
  p = fma(p, f, set(1));
  return times_power_of_two(p, n);
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

// --- softmax over tiles ---------------------------------------------------------------------------

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

// Hides what rows do not see of `count` tokens from `first` on, whose scores are [rows][kTile].
inline void hide(const AttendRequest& r, const Queries& q, int64_t first, int count, int padded, Scratch& s) {
  if (first + padded - 1 <= q.first_last && count == padded && first > q.last_last - r.window) return;  // most pages
  for (int i = 0; i < q.rows; ++i) {
    float* score = s.scores[i];
    const int64_t end = std::clamp<int64_t>(q.last[i] + 1 - first, 0, count);
    const int64_t begin = std::clamp<int64_t>(q.last[i] + 1 - r.window - first, 0, end);
    for (int64_t t = 0; t < begin; ++t) score[t] = -INFINITY;
    for (int64_t t = end; t < padded; ++t) score[t] = -INFINITY;
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

// Turns scores into weights; false if all are negligible. See `weigh`.
inline bool soften(const AttendRequest& r, const Queries& q, int64_t first, int count, const Half* values,
                   const uint8_t* data, Scratch& s) {
  const int padded = (count + kLanes - 1) / kLanes * kLanes;
  for (int i = 0; r.softcap > 0 && i < q.rows; ++i) cap(r, s.scores[i], padded);
  hide(r, q, first, count, padded, s);
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

// --- the hot window -------------------------------------------------------------------------------

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
  if (!soften(r, q, first, count, nullptr, nullptr, s)) return;
  with_loader(r.hot_v, r.hot_dtype, [&](const auto& load_value) {
    const auto values = [&](int i) { return load_value(offset + i); };
    by_four_rows(q.rows, [&](int row, auto h) {
      hot_values<h()>(values, dim, s.weights + row, count, q.softmax[row].out, q.stride);
    });
  });
}

// --- the work and its division --------------------------------------------------------------------

// How a call is cut into items that threads take: by the shapes alone, so that results do not depend on
// the number of threads. An item is a tile of query rows of one KV head and a range of a sequence, which
// is counted in pages and pieces of the hot window.
struct Plan {
  Half key, value;  // where these have no codebook
  bool keys_as_floats;   // not as codes
  bool looks_up_keys, looks_up_values;
  int rows;   // query rows of a KV head: heads that share it times queries
  int tiles;  // of kRows rows
  int parts;  // of a sequence, attended separately and merged
  int part_size;
  Pace pace;  // where there are no lookups

  const Turns* turns = nullptr;   // for keys before the rotary embedding
  const Angle* angles = nullptr;  // of the first page of each part
  const int16_t *word_angles = nullptr, *byte_angles = nullptr;  // for lookups
  const struct RowTables* row_tables = nullptr;  // [batch][kv_heads][rows], where parts share them
  const int* still = nullptr;  // of each head with tables: see find_still

  explicit Plan(const AttendRequest& r)
      : key(half_of(r.key, r)), value(half_of(r.value, r)),
        keys_as_floats(r.key.has_codebook || r.key.inv_freq),
        // zero points that turn with their tokens are no sum to add
        looks_up_keys(r.lookups && r.key.tables && !(r.key.inv_freq && r.key.codes.scales == 2)),
        looks_up_values(r.lookups && r.value.tables) {
    rows = r.heads / r.kv_heads * r.queries;
    tiles = (rows + kRows - 1) / kRows;
    int longest = 1;
    for (int b = 0; b < r.batch; ++b) longest = std::max(longest, num_pages(r, b) + hot_pieces(r, b));
    // enough for any number of threads, but merging a part costs as much as attending to a few pages
    const int items = r.batch * tiles * r.kv_heads, wanted = std::max(1, 64 / items);
    const int least = looks_up_keys ? 4 * kLeastPart : kLeastPart;  // which have tables to make first
    part_size = std::max(least, (longest + wanted - 1) / wanted);
    parts = (longest + part_size - 1) / part_size;
    const int passes = (std::min(rows, kRows) + kMaxH - 1) / kMaxH;
    pace = Pace::of(r.page_bytes() / 64, passes * (key.steps() + value.steps()), passes * (key.pauses() + value.pauses()));
  }

  static Half half_of(const Side& side, const AttendRequest& r) {
    constexpr Part kNone{16, kLanes, kLanes, kLanes, false, DType::f16};
    return {side.has_codebook ? kNone : side.affine, r.lookups};
  }
  static int num_pages(const AttendRequest& r, int b) { return r.packed_len[b] / r.page_size; }
  static int hot_pieces(const AttendRequest& r, int b) { return (r.hot_len[b] + kHotTokens - 1) / kHotTokens; }
  int items(const AttendRequest& r) const { return r.batch * r.kv_heads * tiles * parts; }
  bool tabulates_rows(const AttendRequest& r) const { return looks_up_keys && !r.key.inv_freq; }
};

inline float* grown(std::vector<float>& buffer, size_t size) {
  if (buffer.size() < size) buffer.resize(size);
  return buffer.data();
}

// Rows of queries into s.x; returns them as pages need them.
inline const float* load_queries(const AttendRequest& r, int head, int64_t row, int rows, Scratch& s) {
  const float factor = r.softcap > 0 ? r.scale : r.scale * kLog2e;
  for (int64_t i = 0; i < int64_t(rows) * r.head_dim; i += kLanes) {
    store(s.x[0] + i, load_any(r.q, r.dtype, row * r.head_dim + i) * set(factor));
  }
  if (!r.key.restore || r.key.inv_freq) return s.x[0];
  for (int i = 0; i < rows; ++i) {
    map_back(r.key, head, r.head_dim, s.x[0] + i * r.head_dim, s.mapped[0] + i * r.key.width);
  }
  return s.mapped[0];
}

inline void finish(const AttendRequest& r, int64_t row, float high, float total, const float* sums) {
  r.lse[row] = total > 0 ? (high + std::log2(total)) / kLog2e : -INFINITY;
  const float factor = total > 0 ? 1 / total : 0;
  for (int c = 0; c < r.head_dim; c += kLanes) {
    const F y = load(sums + c) * set(factor);
    const int64_t at = row * r.head_dim + c;
    if (r.dtype == DType::f32) store(static_cast<float*>(r.out) + at, y);
    else if (r.dtype == DType::f16) store_half(static_cast<uint16_t*>(r.out) + at, y);
    else {
      float lanes[kLanes];
      store(lanes, y);
      for (int i = 0; i < kLanes; ++i) {  // nearest, ties to even
        const uint32_t u = std::bit_cast<uint32_t>(lanes[i]);
        static_cast<uint16_t*>(r.out)[at + i] = uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
      }
    }
  }
}

// --- pages ----------------------------------------------------------------------------------------

// Scores of a page's keys, as float32.
inline void score_floats(const AttendRequest& r, const Plan& plan, const Queries& q, const uint8_t* page, int head,
                         const Angle& angle, float* scores, Scratch& s) {
  const Side& key = r.key;
  float* y = s.decoded;
  int dim = key.width;
  const float* x = q.page_x;
  if (key.has_codebook) decode_codes(key, page, head, y);
  else decode_affine_keys(plan.key, page, y);
  if (key.inv_freq) {
    if (key.restore) {
      const float* rows = restore_of(key, head, r.head_dim);
      by_four_rows(r.page_size, [&](int t, auto h) {
        hot_scores<h()>([&](int i) { return load(rows + i); }, dim, y + t * dim, r.head_dim, s.restored + t * r.head_dim,
                        r.head_dim);
      });
      y = s.restored;
    }
    dim = r.head_dim;
    turn(y, dim, *plan.turns);
    float factors[kColumns / 2];
    std::fill_n(factors, key.pairs, key.factor);
    angle.turn_back(q.x, q.rows, key.pairs, dim, factors, s.mapped[0]);
    x = s.mapped[0];
  }
  by_four_rows(q.rows, [&](int row, auto h) {
    hot_scores<h()>([&](int i) { return load(y + i); }, dim, x + row * dim, r.page_size, scores + row * kTile, kTile);
  });
}

inline void add_float_values(const AttendRequest& r, const Queries& q, const uint8_t* data, int head, Scratch& s) {
  decode_codes(r.value, data, head, s.decoded);
  by_four_rows(q.rows, [&](int row, auto h) {
    hot_values<h()>([&](int i) { return load(s.decoded + i); }, r.value.width, s.weights + row, r.page_size,
                    q.softmax[row].out, q.stride);
  });
}

// Scores of a page's keys; `fetch`: what comes next.
inline void score_page(const AttendRequest& r, const Plan& plan, const Queries& q, const uint8_t* page, int head,
                       const Angle& angle, Fetch& fetch, float* scores, Scratch& s) {
  if (plan.keys_as_floats) score_floats(r, plan, q, page, head, angle, scores, s);
  else keys_times(plan.key, page, q.page_x, r.key.width, q.rows, {scores, kTile, false}, fetch, s);
}

// From scores of a page, whose tokens are those from `first` on, to sums of its values.
inline void add_page(const AttendRequest& r, const Plan& plan, const Queries& q, const uint8_t* page, int head, int64_t first,
                     Fetch& fetch, Scratch& s) {
  const uint8_t* data = page + r.key.nbytes();
  const bool integers = !r.value.has_codebook && plan.value.is_integer();
  fetch.pause();
  if (!soften(r, q, first, r.page_size, integers ? &plan.value : nullptr, data, s)) return;
  if (r.value.has_codebook) return add_float_values(r, q, data, head, s);
  values_times(plan.value, data, s.weights[0], kTile, q.rows, {q.softmax[0].out, q.stride, true}, fetch, s);
}

}  // namespace bitkv::BITKV_ISA

#if defined(BITKV_LOOKUP)
#include "tiles.h"
#endif

namespace bitkv::BITKV_ISA {

// Pages of a part of a sequence, up to `end`.
inline void attend_pages(const AttendRequest& r, const Plan& plan, const Queries& q, int b, int head, int part, int end,
                         Scratch& s) {
  const int32_t* table = r.block_table + int64_t(b) * r.table_width;
  const auto page = [&](int i) { return r.pages + (int64_t(table[i]) * r.kv_heads + head) * r.page_stride; };
  Angle angle;
  if (plan.turns) angle = plan.angles[part];
  int i = part * plan.part_size;
  const auto fetch_pages = [&](int from, int count, const uint8_t** next, Pace pace) {
    count = std::clamp(end - from, 0, count);
    for (int p = 0; p < count; ++p) next[p] = page(from + p);
    return Fetch(next, count, r.page_bytes(), pace);
  };
  const uint8_t* next[kTileTokens / 64];
  fetch_pages(i, 1, next, plan.pace).rest();  // the first, which no other one fetches
#if defined(BITKV_LOOKUP)
  if (plan.looks_up_keys || plan.looks_up_values) {
    LookupScratch& l = lookup_scratch();
    l.rows = plan.row_tables ? plan.row_tables + (int64_t(b) * r.kv_heads + head) * plan.rows : l.own_rows;
    if (plan.tabulates_rows(r) && !plan.row_tables && i < end) {
      uint8_t* bytes = l.row_bytes.of(row_table_bytes(r.key) * q.rows);
      tabulate_rows(r.key, head, q.page_x, q.rows, l.products, bytes, l.own_rows);
    }
    const int most = plan.looks_up_values ? kTileTokens / r.page_size : 1;
    const Pace pace = pace_of_lookups(r, plan, q, l);
    if constexpr (kHasMatrix) l.matrix.begin();
    for (int n; i < end; i += n) {
      n = std::min(most, end - i);
      Tile tile;
      tile.pages = n, tile.page_size = r.page_size, tile.head = head;
      tile.first = r.num_sink_tokens + int64_t(i) * r.page_size;
      for (int p = 0; p < n; ++p) tile.page[p] = page(i + p);
      Fetch fetch = fetch_pages(i + n, most, next, pace);
      attend_tile(r, plan, q, tile, angle, fetch, s, l);
    }
    if constexpr (kHasMatrix) l.matrix.end();
  }
#endif
  for (; i < end; ++i) {
    const int64_t first = r.num_sink_tokens + int64_t(i) * r.page_size;
    if (sees_any(r, q, first, r.page_size)) {
      Fetch fetch = fetch_pages(i + 1, 1, next, plan.pace);
      score_page(r, plan, q, page(i), head, angle, fetch, s.scores[0], s);
      add_page(r, plan, q, page(i), head, first, fetch, s);
      fetch.rest();
    }
    if (plan.turns) angle.next_page(*plan.turns);
  }
}

// Sums over values as pages hold them become sums over values.
inline void restore_sums(const AttendRequest& r, const Queries& q, int head, Scratch& s) {
  if (!r.value.restore) return;
  for (int i = 0; i < q.rows; ++i) {
    float* out = q.softmax[i].out;
    map(r.value, head, r.head_dim, out, s.decoded);
    std::copy_n(s.decoded, r.head_dim, out);
  }
}

// Slots [begin, end) of the hot window: sinks come before the pages, the others after them.
inline void attend_slots(const AttendRequest& r, const Queries& q, int b, int head, int begin, int end, Scratch& s) {
  const int64_t offset = (r.hot_rows ? r.hot_rows[b] : b) * r.hot_batch_stride + head * r.hot_head_stride;
  const int sinks = std::clamp(r.num_sink_tokens, begin, std::max(begin, end));
  for (int slot = begin; slot < end;) {
    const bool is_sink = slot < sinks;
    const int stop = std::min(is_sink ? sinks : end, slot + kHotTokens);
    attend_hot(r, q, offset, slot, stop, is_sink ? slot : slot + r.packed_len[b], s);
    slot = stop;
  }
}

inline Scratch& thread_scratch() {
  static thread_local std::unique_ptr<Scratch> scratch;
  if (!scratch) scratch = std::make_unique<Scratch>();
  return *scratch;
}

inline void attend_item(const AttendRequest& r, const Plan& plan, int item, float* partials) {
  Scratch& s = thread_scratch();
  const int p = item % plan.parts, tile = item / plan.parts % plan.tiles;
  const int head = item / plan.parts / plan.tiles % r.kv_heads, b = item / plan.parts / plan.tiles / r.kv_heads;
  const int row0 = tile * kRows, rows = std::min(kRows, plan.rows - row0), dim = r.head_dim;
  const int stride = std::max(dim, r.value.width);
  const int64_t first_row = (int64_t(b) * r.kv_heads + head) * plan.rows + row0;

  Softmax softmax[kRows];
  int64_t last[kRows];
  for (int i = 0; i < rows; ++i) {
    softmax[i] = {-INFINITY, 0, s.out[0] + i * stride};
    const int query = (row0 + i) % r.queries;
    last[i] = r.positions ? r.positions[int64_t(b) * r.queries + query]
                          : int64_t(r.packed_len[b]) + r.hot_len[b] - r.queries + query;
  }
  std::fill_n(s.out[0], rows * stride, 0.0f);
  const auto [first_last, last_last] = std::minmax_element(last, last + rows);
  const float* page_x = load_queries(r, head, first_row, rows, s);
  const Queries q{s.x[0], page_x, last, *first_last, *last_last, softmax, rows, stride};

  const int pages = Plan::num_pages(r, b), begin = p * plan.part_size, end = begin + plan.part_size;
  const int first_slot = std::max(0, begin - pages) * kHotTokens;
  const int slots = std::min(std::max(0, end - pages) * kHotTokens, r.hot_len[b]);
  attend_pages(r, plan, q, b, head, p, std::min(end, pages), s);
  restore_sums(r, q, head, s);
  attend_slots(r, q, b, head, first_slot, slots, s);

  for (int i = 0; i < rows; ++i) {
    if (plan.parts == 1) {
      finish(r, first_row + i, softmax[i].high, softmax[i].total, softmax[i].out);
      continue;
    }
    float* to = partials + ((first_row + i) * plan.parts + p) * (dim + kLanes);
    to[0] = softmax[i].high, to[1] = softmax[i].total;
    for (int c = 0; c < dim; c += kLanes) store(to + kLanes + c, load(softmax[i].out + c));
  }
}

inline void merge(const AttendRequest& r, const Plan& plan, int64_t row, const float* partials) {
  const int stride = r.head_dim + kLanes;
  const float* parts = partials + row * plan.parts * stride;
  float high = -INFINITY, total = 0;
  for (int p = 0; p < plan.parts; ++p) high = std::max(high, parts[p * stride]);
  float sums[kColumns] = {};
  for (int p = 0; p < plan.parts; ++p) {
    const float* part = parts + p * stride;
    if (part[1] == 0) continue;
    const float weight = exp2(part[0] - high);
    total += weight * part[1];
    for (int c = 0; c < r.head_dim; c += kLanes) {
      store(sums + c, fma(load(part + kLanes + c), set(weight), load(sums + c)));
    }
  }
  finish(r, row, high, total, sums);
}

// Angles of keys before the rotary embedding.
inline void prepare_turns(const AttendRequest& r, Plan& plan) {
  static thread_local Turns turns;
  static thread_local std::vector<Angle> angles;
  if (!r.key.inv_freq) return;
  [[maybe_unused]] const bool changed = turns.make(r.key, r.page_size);
  angles.resize(plan.parts);
  for (int p = 0; p < plan.parts; ++p) {
    angles[p].start(turns, r.num_sink_tokens + int64_t(p) * plan.part_size * r.page_size + turns.middle());
  }
  plan.turns = &turns, plan.angles = angles.data();
#if defined(BITKV_LOOKUP)
  static thread_local Room<int16_t> words;
  const size_t places = size_t(turns.pairs) * turns.page_size;  // of 64 tokens in a register of 32 words
  int16_t *word_table = words.of(places / 2 * (kWordAngles + kByteAngles)), *byte_table = word_table + places / 2 * kWordAngles;
  if (changed) word_angles(turns, word_table), byte_angles(turns, byte_table);
  plan.word_angles = word_table, plan.byte_angles = byte_table;
  static thread_local std::vector<int> still;
  still.resize(plan.looks_up_keys ? r.key.codebook.heads : 0);
  for (int h = 0; h < int(still.size()); ++h) still[h] = find_still(turns, Tables(r.key, TableKind::turned_keys, h));
  plan.still = still.data();
#endif
}

#if defined(BITKV_LOOKUP)
// Tables of query rows once for all parts of their sequence, where that is less work and the rows are few.
inline void prepare_row_tables(const AttendRequest& r, Plan& plan) {
  static thread_local Room<uint8_t> room;
  static thread_local std::vector<RowTables> tables;
  if (!plan.tabulates_rows(r) || plan.parts == 1 || plan.tiles > 1) return;
  const size_t size = row_table_bytes(r.key) * plan.rows;
  uint8_t* bytes = room.of(size * r.batch * r.kv_heads);
  tables.resize(size_t(r.batch) * r.kv_heads * plan.rows);
  RowTables* rows = tables.data();
  parallel_for(r.batch * r.kv_heads, r.threads, [&](int item) {
    if (!Plan::num_pages(r, item / r.kv_heads)) return;
    const int64_t first = int64_t(item) * plan.rows;
    const int head = item % r.kv_heads;
    const float* x = load_queries(r, head, first, plan.rows, thread_scratch());
    tabulate_rows(r.key, head, x, plan.rows, lookup_scratch().products, bytes + item * size, rows + first);
  });
  plan.row_tables = rows;
}
#else
inline void prepare_row_tables(const AttendRequest&, Plan&) {}
#endif

void attend(const AttendRequest& r) {
  if (r.batch == 0 || r.queries == 0) return;
  static thread_local std::vector<float> buffer;
  Plan plan(r);
  prepare_turns(r, plan);
  prepare_row_tables(r, plan);
  const int64_t rows = int64_t(r.batch) * r.heads * r.queries;
  float* partials = plan.parts == 1 ? nullptr : grown(buffer, size_t(rows) * plan.parts * (r.head_dim + kLanes));
  parallel_for(plan.items(r), r.threads, [&](int item) { attend_item(r, plan, item, partials); });
  if (plan.parts == 1) return;
  constexpr int kRowsAnItem = 8;
  parallel_for(int((rows + kRowsAnItem - 1) / kRowsAnItem), r.threads, [&](int item) {
    const int64_t end = std::min(rows, int64_t(item + 1) * kRowsAnItem);
    for (int64_t row = int64_t(item) * kRowsAnItem; row < end; ++row) merge(r, plan, row, partials);
  });
}

}  // namespace bitkv::BITKV_ISA
