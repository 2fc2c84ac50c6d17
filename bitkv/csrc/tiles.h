// Pages of indices into a codebook, many at a time: see lookup.h, turned.h and values.h.
//
// No include guard: attend.h includes this where bytes can be looked up.

namespace bitkv::BITKV_ISA {

// What a thread keeps for an item or a tile of it.
struct LookupScratch {
  Room<uint8_t> row_bytes, codes;  // tables of query rows; codes of a tile
  Room<float> products;
  RowTables own_rows[kRows];
  const RowTables* rows;  // of the item's queries
  alignas(64) int32_t sums[kRows][kTile];
  ItemQueries turned;
  TurnedQueries queries[kShortTile / 64];  // of each page
  ByteRows weights;
  Matrix matrix;
  MatrixKeys matrix_keys;
  ValueRoom values;
};

inline LookupScratch& lookup_scratch() {
  static thread_local std::unique_ptr<LookupScratch> scratch;
  if (!scratch) scratch = std::make_unique<LookupScratch>();
  return *scratch;
}

// Consecutive pages of a sequence.
struct Tile {
  const uint8_t* page[kTileTokens / 64];
  int pages, page_size, head;
  int64_t first;  // token

  int tokens() const { return pages * page_size; }
};

inline size_t row_table_bytes(const Side& key) { return size_t(key.codes.groups()) * 2 * kEntries; }

// Tables of query rows x, in `bytes` from row to row.
inline void tabulate_rows(const Side& key, int head, const float* x, int count, Room<float>& room, uint8_t* bytes, RowTables* rows) {
  const size_t size = row_table_bytes(key);
  float* products = room.of(size * 2);  // of four rows
  by_four_rows(count, [&](int row, auto h) {
    multiply_entries<h()>(key, head, x + row * key.width, products);
    for (int i = 0; i < h(); ++i) {
      rows[row + i].bytes = bytes + (row + i) * size;
      tabulate_row(key, head, x + (row + i) * key.width, products + i * size / 2, rows[row + i]);
    }
  });
}

// A tile's codes, `offset` bytes into its pages: as they lie there, or as bytes side by side where they are fewer bits.
inline Codes codes_of(const Tile& tile, const CodePart& part, size_t offset, Room<uint8_t>& room) {
  const int per_page = tile.page_size / kVector;
  const bool copied = part.bits < 8;
  uint8_t* copy = copied ? room.of(size_t(part.groups()) * kTile) : nullptr;
  Codes codes;
  codes.stride = size_t(copied ? kTile : tile.page_size);
  codes.page_size = tile.page_size, codes.vectors = tile.pages * per_page;
  for (int p = 0; p < tile.pages; ++p) {
    const uint8_t* data = tile.page[p] + offset;
    if (copied) copy_codes(part, data, copy + p * tile.page_size);
    for (int v = 0; v < per_page; ++v) {
      codes.from[p * per_page + v] = (copied ? copy + p * tile.page_size : data) + v * kVector;
    }
  }
  return codes;
}

// A step is a vector of codes that meets rows of queries, a row of wide tables or two channels of values.
inline Pace pace_of_lookups(const AttendRequest& r, const Plan& plan, const Queries& q, const LookupScratch& l) {
  const int vectors = r.page_size / kVector, fours = (q.rows + 3) / 4, sixteens = (q.rows + 15) / 16;
  int64_t steps = 0;
  if (!plan.looks_up_keys) {
    steps += plan.keys_as_floats ? 0 : plan.key.steps();
  } else if (r.key.inv_freq) {
    steps += vectors * r.key.pairs * (kHasMatrix && q.rows >= kMatrixLeast ? sixteens : fours);
  } else {
    for (int i = 0; i < q.rows; i += rows_at_once(l.rows + i, q.rows - i)) steps += vectors * r.key.codes.groups();
  }
  if (!plan.looks_up_values) {
    steps += r.value.has_codebook ? 0 : plan.value.steps();
  } else {
    const bool is_fine = Tables(r.value, TableKind::values, 0).is_fine();
    steps += vectors * (r.value.width / 2) * (kHasMatrix ? sixteens : fours) * (is_fine ? 2 : 1);
  }
  return Pace::of(r.page_bytes() / 64, steps, 0);
}

// Scores of keys before the rotary embedding; `angle` is that of the first page, and goes on.
inline void score_turned(const AttendRequest& r, const Plan& plan, const Queries& q, const Tile& tile, Angle& angle,
                         Fetch& fetch, Scratch& s, LookupScratch& l) {
  const Side& key = r.key;
  const Tables tables(key, TableKind::turned_keys, tile.head);
  const bool as_bytes = l.turned.as_bytes;
  const int still = l.turned.still;
  for (int p = 0; p < tile.pages; ++p, angle.next_page(*plan.turns)) {
    if (as_bytes) {
      float cos[kColumns / 2], sin[kColumns / 2];
      angle.scaled(key.pairs, l.turned.factors, cos, sin);
      by_four_rows(q.rows, [&](int row, auto h) {
        round_turned_to_bytes<h()>(l.turned.scaled, cos, sin, key.pairs, still, l.queries[p], row);
      });
      continue;
    }
    angle.turn_back(q.x, q.rows, key.pairs, r.head_dim, l.turned.factors, s.mapped[0]);
    for (int i = 0; i < q.rows; ++i) round_turned_to_words(s.mapped[0] + i * r.head_dim, key.pairs, l.queries[p], i);
  }
  const Codes codes = codes_of(tile, key.codes, 0, l.codes);
  const TurnedKeys keys{codes, tables, key.codes.channels, key.pairs, reinterpret_cast<const V*>(plan.word_angles),
                        reinterpret_cast<const V*>(plan.byte_angles), l.queries};
  const int per_page = tile.page_size / kVector;
  const bool by_matrix = as_bytes && kHasMatrix && q.rows >= kMatrixLeast;
  for (int row = 0, n; by_matrix && row < q.rows; row += n) {
    n = std::min(kMatrixRows, q.rows - row);
    l.matrix.shape_keys(n);
    score_by_matrix(keys, still, row, l.sums, l.matrix_keys, fetch);
  }
  for (int pair = 0, last; !by_matrix && pair < key.pairs; pair = last) {
    last = std::min(pair < still ? still : key.pairs, pair + kPairs);
    by_four_rows(q.rows, [&](int row, auto h) {
      const auto score = as_bytes           ? pair < still ? score_byte_pairs<false, h()> : score_byte_pairs<true, h()>
                         : tables.is_fine() ? score_pairs<true, h()>
                                            : score_pairs<false, h()>;
      score(keys, pair, last, row, l.sums[row], fetch);
    });
  }
  for (int i = 0; i < q.rows; ++i) {
    for (int v = 0; v < codes.vectors; ++v) {
      const TurnedQueries& of = l.queries[v / per_page];
      put_turned(l.sums[i] + v * kVector, as_bytes, of.unit[i], of.offset[i], s.scores[i] + v * kVector);
    }
  }
}

// Scores become those of keys that have scales of their own; sums: of the query rows.
inline void scale_scores(const CodePart& part, const uint8_t* data, int rows, const float* sums, float* scores) {
  for (int t = 0; part.scales && t < part.page_size; t += kVector) {
    F scale[4], zero[4];
    deal_halves(part.scale(data) + t, scale);
    if (part.scales == 2) deal_halves(part.zero_point(data) + t, zero);
    for (int i = 0; i < rows; ++i) {
      repeat<4>([&](auto j) {
        float* at = scores + i * kTile + t + j * kLanes;
        store(at, fma(load(at), scale[j], part.scales == 2 ? zero[j] * set(sums[i]) : set(0)));
      });
    }
  }
}

// Scores of a tile, dealt if values are looked up.
inline void score_tile(const AttendRequest& r, const Plan& plan, const Queries& q, const Tile& tile, Angle& angle, Fetch& fetch,
                       Scratch& s, LookupScratch& l) {
  const Side& key = r.key;
  if (!plan.looks_up_keys) {
    for (int p = 0; p < tile.pages; ++p) {
      score_page(r, plan, q, tile.page[p], tile.head, angle, nullptr, fetch, s.scores[0] + p * tile.page_size, s);
      if (plan.turns) angle.next_page(*plan.turns);
    }
    if (plan.looks_up_values) reorder<deal>(s.scores[0], q.rows, tile.tokens());
    return;
  }
  float sums[kRows] = {};  // which zero points multiply; turned keys have none
  if (key.inv_freq) {
    score_turned(r, plan, q, tile, angle, fetch, s, l);
  } else {
    score_codes(codes_of(tile, key.codes, 0, l.codes), key.codes.groups(), l.rows, q.rows, fetch, s.scores[0]);
    for (int i = 0; i < q.rows; ++i) sums[i] = l.rows[i].sum;
  }
  for (int p = 0; p < tile.pages; ++p) {
    scale_scores(key.codes, tile.page[p], q.rows, sums, s.scores[0] + p * tile.page_size);
  }
  if (!plan.looks_up_values) reorder<undeal>(s.scores[0], q.rows, tile.tokens());
}

// Weights times scales of values that have them, and what zero points add to all channels.
inline void scale_weights(const CodePart& part, const Queries& q, const Tile& tile, size_t offset, int width, Scratch& s) {
  if (!part.scales) return;
  F zeros[kRows];
  for (int i = 0; i < q.rows; ++i) zeros[i] = set(0);
  for (int t = 0; t < tile.tokens(); t += kVector) {
    const uint8_t* data = tile.page[t / tile.page_size] + offset;
    F scale[4], zero[4];
    deal_halves(part.scale(data) + t % tile.page_size, scale);
    if (part.scales == 2) deal_halves(part.zero_point(data) + t % tile.page_size, zero);
    for (int i = 0; i < q.rows; ++i) {
      repeat<4>([&](auto j) {
        float* at = s.weights[i] + t + j * kLanes;
        const F weight = load(at);
        if (part.scales == 2) zeros[i] = fma(weight, zero[j], zeros[i]);
        store(at, weight * scale[j]);
      });
    }
  }
  for (int i = 0; part.scales == 2 && i < q.rows; ++i) {
    const F zero = set(sum(zeros[i]));
    for (int c = 0; c < width; c += kLanes) store(q.softmax[i].out + c, load(q.softmax[i].out + c) + zero);
  }
}

inline void add_tile_values(const AttendRequest& r, const Queries& q, const Tile& tile, Fetch& fetch, Scratch& s,
                            LookupScratch& l) {
  const Side& value = r.value;
  const Tables tables(value, TableKind::values, tile.head);
  scale_weights(value.codes, q, tile, r.key.nbytes(), value.width, s);
  float totals[kRows];
  round_weights(s.weights[0], q.rows, tile.tokens(), tables.spread(), l.weights, totals);
  for (int i = 0; i < q.rows; ++i) {
    float* out = q.softmax[i].out;
    for (int c = 0; c < value.width; c += kLanes) {
      store(out + c, fma(set(totals[i]), load(tables.middles() + c), load(out + c)));
    }
  }
  const Codes codes = codes_of(tile, value.codes, r.key.nbytes(), l.codes);
  ValueSums sums{codes, tables, value.codes.channels, q.softmax[0].out, q.stride, fetch};
  add_values(sums, l.weights, l.matrix, l.values);
}

// A tile of pages; of one page where values are not looked up.
inline void attend_tile(const AttendRequest& r, const Plan& plan, const Queries& q, const Tile& tile, Angle& angle, Fetch& fetch,
                        Scratch& s, LookupScratch& l) {
  if (!sees_any(r, q, tile.first, tile.tokens())) {
    for (int p = 0; plan.turns && p < tile.pages; ++p) angle.next_page(*plan.turns);
    return;
  }
  score_tile(r, plan, q, tile, angle, fetch, s, l);
  if (!plan.looks_up_values) {
    add_page(r, plan, q, tile.page[0], tile.head, tile.first, fetch, s);
  } else if (soften(r, q, tile.first, tile.tokens(), nullptr, nullptr, dealt, s)) {
    add_tile_values(r, q, tile, fetch, s, l);
  }
  fetch.rest();
}

}  // namespace bitkv::BITKV_ISA
