// The division of a call.
//
// No include guard: attend.h includes this once.

namespace bitkv::BITKV_ISA {

constexpr int kLeastPart = 16;  // pages
constexpr int kMostEntries = 1024;  // whose sums for a group of channels stay in the first-level cache
constexpr size_t kTileBytes = 64 << 10;  // of pages in a long tile, at most

// How a call is cut into items that threads take: by the shapes alone, so that results do not depend on
// the number of threads. An item is a tile of query rows of one KV head and a range of a sequence, which
// is counted in pages and pieces of the hot window.
struct Plan {
  Half key, value;  // where these have no codebook
  bool keys_as_floats;   // not as codes
  bool looks_up_keys, looks_up_values;
  int rows;   // query rows of a KV head: heads that share it times queries
  bool keys_by_entries, values_by_entries;  // see entries.h
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
        looks_up_values(r.lookups && r.value.tables), rows(r.heads / r.kv_heads * r.queries),
        keys_by_entries(!looks_up() && !r.key.inv_freq && has_few_entries(r.key)),
        values_by_entries(!looks_up() && has_few_entries(r.value)) {
    tiles = (rows + kRows - 1) / kRows;
    int longest = 1;
    for (int b = 0; b < r.batch; ++b) longest = std::max(longest, num_pages(r, b) + hot_pieces(r, b));
    // enough for any number of threads, but merging a part costs as much as attending to a few pages
    const int items = r.batch * tiles * r.kv_heads, wanted = std::max(1, 64 / items);
    const int least = looks_up_keys || keys_by_entries ? 4 * kLeastPart : kLeastPart;  // which have tables to make first
    part_size = std::max(least, (longest + wanted - 1) / wanted);
    parts = (longest + part_size - 1) / part_size;
    const int passes = (std::min(rows, kRows) + kMaxH - 1) / kMaxH;
    const int pauses = passes * (key.pauses() + value.pauses()) + values_by_entries;
    pace = Pace::of(r.page_bytes() / 64, passes * (key.steps() + value.steps()), pauses);
  }

  static Half half_of(const Side& side, const AttendRequest& r) {
    constexpr Part kNone{16, kLanes, kLanes, kLanes, false, DType::f16};
    return {side.has_codebook ? kNone : side.affine, r.lookups};
  }
  static int num_pages(const AttendRequest& r, int b) { return r.packed_len[b] / r.page_size; }
  static int hot_pieces(const AttendRequest& r, int b) { return (r.hot_len[b] + kHotTokens - 1) / kHotTokens; }
  int items(const AttendRequest& r) const { return r.batch * r.kv_heads * tiles * parts; }
  // Pages whose scores are kept together. Tables of query rows and of values are read again for every tile, from the
  // second-level cache: tiles of the shortest codes are twice as long. Sums of entries meet the codebook once a tile.
  int tile_pages(const AttendRequest& r) const {
    if (values_by_entries) return kTileTokens / r.page_size;
    if (!looks_up_values) return 1;
    const bool is_long = tabulates_rows(r) && kTileTokens / r.page_size * r.page_bytes() <= kTileBytes;
    return (is_long ? kTileTokens : kShortTile) / r.page_size;
  }
  bool looks_up() const { return looks_up_keys || looks_up_values; }
  // Whether a side may be attended by entries: a load for four rows has to replace enough products.
  bool has_few_entries(const Side& side) const {
    return side.has_codebook && side.codebook.entries <= kMostEntries && side.codes.channels > 1 &&
           std::min(rows, kRows) <= 8 * side.codes.channels;
  }
  bool tabulates_rows(const AttendRequest& r) const { return looks_up_keys && !r.key.inv_freq; }
};

}  // namespace bitkv::BITKV_ISA
