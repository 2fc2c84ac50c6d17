// Attention over pages and the hot window, for the vector vocabulary of one instruction set: items of the plan
// for threads, tiles of pages for items, and the merging of parts.
//
// No include guard: each isa_*.cpp includes this once, after its simd header.

#include "fetch.h"
#include "rows.h"
#include "rounding.h"
#include "codes.h"
#include "floats.h"
#include "decode.h"
#include "softmax.h"
#include "window.h"
#include "plan.h"
#include "entries.h"
#if defined(BITKV_LOOKUP)
#include "tables.h"
#include "matrix.h"
#include "lookup.h"
#include "turned.h"
#include "values.h"
#endif

namespace bitkv::BITKV_ISA {

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

// Scores of a page's keys; `products` of queries with their entries, or null; `fetch`: what comes next.
inline void score_page(const AttendRequest& r, const Plan& plan, const Queries& q, const uint8_t* page, int head,
                       const Angle& angle, const Four* products, Fetch& fetch, float* scores, Scratch& s) {
  if (products) score_entries(r.key, page, products, q.page_x, q.rows, scores);
  else if (plan.keys_as_floats) score_floats(r, plan, q, page, head, angle, scores, s);
  else keys_times(plan.key, page, q.page_x, r.key.width, q.rows, {scores, kTile, false}, fetch, s);
}

// From scores of a page, whose tokens are those from `first` on, to sums of its values.
inline void add_page(const AttendRequest& r, const Plan& plan, const Queries& q, const uint8_t* page, int head, int64_t first,
                     Fetch& fetch, Scratch& s) {
  const uint8_t* data = page + r.key.nbytes();
  const bool integers = !r.value.has_codebook && plan.value.is_integer();
  fetch.pause();
  if (!soften(r, q, first, r.page_size, integers ? &plan.value : nullptr, data, undealt, s)) return;
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
  if (plan.looks_up()) {
    LookupScratch& l = lookup_scratch();
    l.rows = plan.row_tables ? plan.row_tables + (int64_t(b) * r.kv_heads + head) * plan.rows : l.own_rows;
    if (plan.tabulates_rows(r) && !plan.row_tables && i < end) {
      uint8_t* bytes = l.row_bytes.of(row_table_bytes(r.key) * q.rows);
      tabulate_rows(r.key, head, q.page_x, q.rows, l.products, bytes, l.own_rows);
    }
    if (plan.looks_up_keys && r.key.inv_freq) l.turned.make(r, plan, q, head);
    const int most = plan.tile_pages(r);
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
  EntryScratch& e = entry_scratch();
  const int64_t tokens = int64_t(end - i) * r.page_size;
  const bool keys_by_entries = plan.keys_by_entries && are_worth(r.key, tokens);
  const bool values_by_entries = plan.values_by_entries && are_worth(r.value, tokens);
  const Four* products = keys_by_entries ? multiply_by_entries(r.key, head, q, e) : nullptr;
  const int most = values_by_entries ? plan.tile_pages(r) : 1;
  for (int n; i < end; i += n) {
    n = std::min(most, end - i);
    const int64_t first = r.num_sink_tokens + int64_t(i) * r.page_size;
    const bool is_seen = sees_any(r, q, first, int64_t(n) * r.page_size);
    Fetch fetch = fetch_pages(i + n, is_seen ? most : 0, next, plan.pace);
    for (int p = 0; p < n; ++p) {
      if (most > 1) fetch.pause();
      if (is_seen) score_page(r, plan, q, page(i + p), head, angle, products, fetch, s.scores[0] + p * r.page_size, s);
      if (plan.turns) angle.next_page(*plan.turns);
    }
    if (!is_seen) continue;
    const auto value = [&](int p) { return page(i + p) + r.key.nbytes(); };
    if (values_by_entries) add_entry_pages(r, q, value, n, head, first, s, e);
    else add_page(r, plan, q, page(i), head, first, fetch, s);
    fetch.rest();
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
