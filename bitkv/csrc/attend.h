// Attention over pages and the hot window, for the vector vocabulary of one instruction set: online softmax
// over tiles, the division of a call into items for threads, and their merging.
//
// No include guard: each isa_*.cpp includes this once, after its simd header.

#include "rows.h"

namespace bitkv::BITKV_ISA {

constexpr int kHotTokens = 128;    // of a tile of the hot window
constexpr float kLog2e = 1.44269504088896f;
constexpr float kNegligible = 0x1p-40f;  // a share of the sum that float32 cannot notice
constexpr float kHeadroom = 0x1p30f;     // weights may grow this far before `high` follows the scores

inline F exp2(F x) {
  const F f = fraction(x);
  F p = fma(f, set(0.001893754f), set(0.00894959085f));  // within 2e-7 of 2^f
  p = fma(p, f, set(0.0558603369f));
  p = fma(p, f, set(0.240141824f));
  p = fma(p, f, set(0.693154514f));
  p = fma(p, f, set(0.999999881f));
  return times_power_of_two(p, x);
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
  const int64_t* last;     // newest token that each row sees
  Softmax* softmax;
  int rows;
  Guess guess;             // of the unit of x times a page's scales
};

inline float largest(const float* score, int count) {
  F top = load(score);
  for (int t = kLanes; t < count; t += kLanes) top = max(top, load(score + t));
  return max(top);
}

// Makes `high` the score that weighs 1.
inline void raise(const AttendRequest& r, Softmax& state, float high) {
  if (high == -INFINITY) return;
  const float decay = state.total > 0 ? exp2(state.high - high) : 0;
  for (int c = 0; c < r.head_dim; c += kLanes) store(state.out + c, load(state.out + c) * set(decay));
  state.total *= decay;
  state.high = high;
}

// Hides what rows do not see of `count` tokens from `first` on, whose scores are [rows][kColumns].
inline void hide(const AttendRequest& r, const Queries& q, int64_t first, int count, int padded, Scratch& s) {
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

// Scores of H rows to weights relative to `high`; with `values`, to weights times the scales of the
// tokens' values, measured on the way for rounding. The sums of the weights go to `total`.
template <int H>
inline void weigh(const Queries& q, int row, int count, const Half* values, ColumnScales of, float* total, Scratch& s) {
  F totals[H], top[H], squares[H], offsets[H];
  repeat<H>([&](auto h) { totals[h] = top[h] = squares[h] = offsets[h] = set(0); });
  float high[H];
  for (int h = 0; h < H; ++h) high[h] = std::max(q.softmax[row + h].high, -FLT_MAX);  // -inf: nothing seen yet
  const auto weight = [&](int h, int t) { return exp2(load(s.scores[row + h] + t) - set(high[h])); };
  if (!values) {
    for (int t = 0; t < count; t += kLanes) {
      repeat<H>([&](auto h) {
        const F p = weight(h, t);
        store(s.weights[row + h] + t, p);
        totals[h] = totals[h] + p;
      });
    }
    return sums_of<H>(totals, total);
  }
  const F half = set(float((1 << values->bits) - 1) / 2);
  for (int t = 0; t < count; t += kLanes) {
    const F scale = load_half(of.scale + t), middle = fma(scale, half, load_half(of.zero + t));
    repeat<H>([&](auto h) {
      const F p = weight(h, t), y = p * scale;
      store(s.weights[row + h] + t, y);
      totals[h] = totals[h] + p;
      offsets[h] = fma(p, middle, offsets[h]);
      squares[h] = fma(y, y, squares[h]);
      top[h] = max(top[h], values->tables ? sums_of_fours(abs(y)) : abs(y));
    });
  }
  sums_of<H>(totals, total);
  maxima_of<H>(top, s.measured.largest + row);
  sums_of<H>(squares, s.measured.square + row);
  sums_of<H>(offsets, s.measured.offset + row);
}

// Turns scores into weights; false if all are negligible. See `weigh`.
inline bool soften(const AttendRequest& r, const Queries& q, int64_t first, int count, const Half* values,
                   ColumnScales of, Scratch& s) {
  const int padded = (count + kLanes - 1) / kLanes * kLanes;
  for (int i = 0; r.softcap > 0 && i < q.rows; ++i) cap(r, s.scores[i], padded);
  hide(r, q, first, count, padded, s);
  for (int i = 0; i < q.rows; ++i) {
    if (q.softmax[i].high == -INFINITY) raise(r, q.softmax[i], largest(s.scores[i], padded));
  }
  bool matters = false;
  by_rows(q.rows, [&](int row, auto h) {
    float total[h()];
    weigh<h()>(q, row, padded, values, of, total, s);
    bool raised = false;
    for (int i = 0; i < h(); ++i) {
      if (total[i] <= kHeadroom) continue;
      raise(r, q.softmax[row + i], largest(s.scores[row + i], padded));
      raised = true;
    }
    if (raised) weigh<h()>(q, row, padded, values, of, total, s);
    for (int i = 0; i < h(); ++i) {
      Softmax& state = q.softmax[row + i];
      matters |= total[i] > state.total * kNegligible;
      state.total += total[i];
    }
  });
  return matters;
}

inline bool sees_any(const AttendRequest& r, const Queries& q, int64_t first, int64_t count) {
  for (int i = 0; i < q.rows; ++i) {
    if (q.last[i] >= first && q.last[i] - r.window < first + count - 1) return true;
  }
  return false;
}

inline void attend_page(const AttendRequest& r, const Half& key, const Half& value, const Queries& q,
                        const uint8_t* page, int64_t first, ptrdiff_t ahead, Scratch& s) {
  if (!sees_any(r, q, first, r.page_size)) return;
  keys_times(key, page, q.x, r.head_dim, q.rows, q.guess, {s.scores[0], kColumns, false}, ahead, s);
  const uint8_t* data = page + key.nbytes;
  // with one scale a token, values are measured along with the softmax
  const bool fused = !value.is_raw && value.bits < 8 && value.groups == 1;
  const ColumnScales of{value.scales(data), value.zeros(data)};
  if (!soften(r, q, first, r.page_size, fused ? &value : nullptr, of, s)) return;
  values_times(value, data, s.weights[0], kColumns, q.rows, fused ? &s.measured : nullptr,
               {q.softmax[0].out, r.head_dim, true}, ahead, s);
}

// --- the hot window -------------------------------------------------------------------------------

inline F load_any(const void* p, DType dtype, int64_t index) {
  return dtype == DType::f32 ? load(static_cast<const float*>(p) + index)
                             : load(static_cast<const uint16_t*>(p) + index, dtype);
}

// Slots [begin, end) of the hot window, at most kHotTokens, which hold the tokens from `first` on.
inline void attend_hot(const AttendRequest& r, const Queries& q, int64_t offset, int begin, int end, int64_t first,
                       Scratch& s) {
  const int count = end - begin, dim = r.head_dim;
  if (count <= 0 || !sees_any(r, q, first, count)) return;
  offset += int64_t(begin) * dim;
  by_rows(q.rows, [&](int row, auto h) {
    for (int t = 0; t < count; ++t) {
      F acc[h()];
      repeat<h()>([&](auto i) { acc[i] = set(0); });
      for (int c = 0; c < dim; c += kLanes) {
        const F k = load_any(r.hot_k, r.hot_dtype, offset + int64_t(t) * dim + c);
        repeat<h()>([&](auto i) { acc[i] = fma(k, load(q.x + (row + i) * dim + c), acc[i]); });
      }
      repeat<h()>([&](auto i) { s.scores[row + i][t] = sum(acc[i]); });
    }
  });
  if (!soften(r, q, first, count, nullptr, {}, s)) return;
  by_rows(q.rows, [&](int row, auto h) {
    for (int c = 0; c < dim; c += kLanes) {
      F acc[h()];
      repeat<h()>([&](auto i) { acc[i] = load(q.softmax[row + i].out + c); });
      for (int t = 0; t < count; ++t) {
        const F v = load_any(r.hot_v, r.hot_dtype, offset + int64_t(t) * dim + c);
        repeat<h()>([&](auto i) { acc[i] = fma(v, set(s.weights[row + i][t]), acc[i]); });
      }
      repeat<h()>([&](auto i) { store(q.softmax[row + i].out + c, acc[i]); });
    }
  });
}

// --- the work and its division --------------------------------------------------------------------

// How a call is cut into items that threads take: by the shapes alone, so that results do not depend
// on the number of threads. With few query rows an item is a range of pages, all KV heads (their
// pages lie side by side); with many, it is a tile of rows of one KV head.
struct Plan {
  Half key, value;
  size_t page_bytes;
  int rows;         // query rows of a KV head: heads that share it times queries
  int tiles;        // of kRows rows
  int head_ranges;  // 1: all KV heads in one item
  int parts;        // of a sequence, attended separately and merged
  int pages_a_part, hot_parts;
  int hot_a_part;

  explicit Plan(const AttendRequest& r) : key(r.key), value(r.value), page_bytes(r.page_bytes()) {
    rows = r.heads / r.kv_heads * r.queries;
    tiles = (rows + kRows - 1) / kRows;
    head_ranges = tiles == 1 ? 1 : r.kv_heads;
    int pages = 0, hot = 0;
    for (int b = 0; b < r.batch; ++b) {
      pages = std::max(pages, r.packed_len[b] / r.page_size);
      hot = std::max(hot, r.hot_len[b]);
    }
    const int items = r.batch * tiles * head_ranges;
    if (items >= 32 && tiles > 1) {  // enough for any number of threads
      parts = 1, pages_a_part = pages, hot_parts = 0, hot_a_part = hot;
      return;
    }
    const int wanted = std::max(1, 32 / items);
    pages_a_part = std::max(4, (pages + wanted - 1) / wanted);
    hot_a_part = 32;  // not all of it for one thread
    hot_parts = (hot + hot_a_part - 1) / hot_a_part;
    parts = (pages + pages_a_part - 1) / pages_a_part + hot_parts;
    parts = std::max(parts, 1);
  }

  int items(const AttendRequest& r) const { return r.batch * parts * tiles * head_ranges; }
};

inline float* grown(std::vector<float>& buffer, size_t size) {
  if (buffer.size() < size) buffer.resize(size);
  return buffer.data();
}

inline void load_queries(const AttendRequest& r, int64_t row, int rows, float* x) {
  const float factor = r.softcap > 0 ? r.scale : r.scale * kLog2e;
  for (int64_t i = 0; i < int64_t(rows) * r.head_dim; i += kLanes) {
    store(x + i, load_any(r.q, r.dtype, row * r.head_dim + i) * set(factor));
  }
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

// One item: part `p` of sequence `b` for a tile of query rows and a range of KV heads.
inline void attend_item(const AttendRequest& r, const Plan& plan, int item, float* partials) {
  static thread_local std::vector<float> buffer;
  static thread_local std::vector<Softmax> softmaxes;
  static thread_local std::unique_ptr<Scratch> scratch;
  if (!scratch) scratch = std::make_unique<Scratch>();
  const int p = plan.parts - 1 - item % plan.parts, range = item / plan.parts % plan.head_ranges;
  const int tile = item / plan.parts / plan.head_ranges % plan.tiles;
  const int b = item / plan.parts / plan.head_ranges / plan.tiles;
  const int head0 = plan.head_ranges == 1 ? 0 : range, heads = plan.head_ranges == 1 ? r.kv_heads : 1;
  const int row0 = tile * kRows, rows = std::min(kRows, plan.rows - row0);
  const int dim = r.head_dim;

  const size_t numbers = size_t(heads) * rows * dim;
  float* x = grown(buffer, 3 * numbers + heads * rows);
  float *out = x + numbers, *in_units = out + numbers, *inverse = in_units + numbers;
  std::fill_n(inverse, heads * rows, 0.0f);
  std::fill_n(out, size_t(heads) * rows * dim, 0.0f);
  softmaxes.resize(std::max(softmaxes.size(), size_t(heads) * rows));
  int64_t last[kRows];
  for (int i = 0; i < rows; ++i) last[i] = r.positions[int64_t(b) * r.queries + (row0 + i) % r.queries];
  const auto global_row = [&](int h) { return (int64_t(b) * r.kv_heads + head0 + h) * plan.rows + row0; };
  const auto queries = [&](int h) -> Queries {
    return {x + size_t(h) * rows * dim, last, softmaxes.data() + size_t(h) * rows, rows,
            {in_units + size_t(h) * rows * dim, inverse + h * rows}};
  };
  for (int h = 0; h < heads; ++h) {
    load_queries(r, global_row(h), rows, x + size_t(h) * rows * dim);
    for (int i = 0; i < rows; ++i) {
      softmaxes[size_t(h) * rows + i] = {-INFINITY, 0, out + (size_t(h) * rows + i) * dim};
    }
  }

  const int page_parts = plan.parts - plan.hot_parts, num_pages = r.packed_len[b] / r.page_size;
  const bool whole = plan.parts == 1;
  if (whole || p < page_parts) {
    const int begin = p * plan.pages_a_part, end = std::min(num_pages, begin + plan.pages_a_part);
    const int32_t* table = r.block_table + int64_t(b) * r.table_width;
    const auto page_at = [&](int i, int h) {
      return r.pages + (int64_t(table[i]) * r.kv_heads + head0 + h) * int64_t(plan.page_bytes);
    };
    for (int i = begin; i < end; ++i) {
      for (int h = 0; h < heads; ++h) {
        const uint8_t* page = page_at(i, h);
        const uint8_t* next = h + 1 < heads ? page + plan.page_bytes : i + 1 < end ? page_at(i + 1, 0) : page;
        attend_page(r, plan.key, plan.value, queries(h), page, r.num_sink_tokens + int64_t(i) * r.page_size, next - page, *scratch);
      }
    }
  }
  if (whole || p >= page_parts) {
    const int begin = whole ? 0 : (p - page_parts) * plan.hot_a_part;
    const int end = std::min(r.hot_len[b], whole ? r.hot_len[b] : begin + plan.hot_a_part);
    for (int h = 0; h < heads; ++h) {
      const int64_t offset = b * r.hot_batch_stride + (head0 + h) * r.hot_head_stride;
      for (int slot = begin; slot < end;) {
        // sinks come before the pages, the others after them
        const bool is_sink = slot < r.num_sink_tokens;
        int stop = std::min(end, slot + kHotTokens);
        if (is_sink) stop = std::min(stop, r.num_sink_tokens);
        attend_hot(r, queries(h), offset, slot, stop, is_sink ? slot : slot + r.packed_len[b], *scratch);
        slot = stop;
      }
    }
  }

  for (int h = 0; h < heads; ++h) {
    for (int i = 0; i < rows; ++i) {
      const Softmax& state = softmaxes[size_t(h) * rows + i];
      if (whole) {
        finish(r, global_row(h) + i, state.high, state.total, state.out);
        continue;
      }
      float* to = partials + ((global_row(h) + i) * plan.parts + p) * (dim + kLanes);
      to[0] = state.high, to[1] = state.total;
      for (int c = 0; c < dim; c += kLanes) store(to + kLanes + c, load(state.out + c));
    }
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

void attend(const AttendRequest& r) {
  if (r.batch == 0 || r.queries == 0) return;
  static thread_local std::vector<float> buffer;
  const Plan plan(r);
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
