// What the instruction sets implement, once each: a table of functions chosen at run time.
#pragma once

#include <cstdint>

#include "page.h"

namespace bitkv {

// A half of a page, and what all pages of a layer share of it: bitkv/shared.py in C++. The numbers y of a
// page become keys or values x = rope(restore y).
struct Side {
  bool has_codebook;
  Part affine;     // without a codebook
  CodePart codes;  // with one
  Codebook codebook;
  const float* restore;  // [restore_heads, head_dim, width], or null
  int restore_heads;
  int width;             // of y
  const float* inv_freq;  // [pairs], or null: radians a token of channels i and i + pairs; keys only
  int pairs;
  float factor;           // on the channels that turn
  const uint8_t* tables;  // what `Kernels::tabulate` made of the codebook, or null

  size_t nbytes() const { return has_codebook ? codes.nbytes() : affine.nbytes(); }
};

// One call of attention over a layer's cache; see bitkv/attention/base.py. All tensors are contiguous
// but the hot window, whose strides (in elements) leave the last axis contiguous.
struct AttendRequest {
  const void* q;    // [batch, heads, queries, head_dim] of `dtype`
  void* out;        // the same
  float* lse;       // [batch, heads, queries]
  DType dtype;
  int batch, heads, kv_heads, queries, head_dim;

  Side key, value;
  const uint8_t* pages;  // [num_pages, kv_heads, page_stride], of which a page has key.nbytes() + value.nbytes()
  int64_t page_stride;
  int page_size;
  const int32_t* block_table;  // [batch, table_width]
  int table_width;
  const int32_t* packed_len;   // [batch]
  const void* hot_k;           // [batch, kv_heads, capacity, head_dim] of `hot_dtype`
  const void* hot_v;
  const int32_t* hot_rows;     // [batch], where of the first axis each sequence is; null: in order
  DType hot_dtype;
  int64_t hot_batch_stride, hot_head_stride;
  const int32_t* hot_len;      // [batch]
  int num_sink_tokens;

  // [batch, queries], the last token each query sees, -1 for none; null: the queries are the newest tokens,
  // and each sees those up to its own
  const int64_t* positions;
  float scale;
  int64_t window;  // tokens each query sees at most
  float softcap;   // 0 for none
  int threads;
  bool lookups;  // whether the CPU looks up 64 bytes at once (AVX-512 VBMI)

  size_t page_bytes() const { return key.nbytes() + value.nbytes(); }
};

enum class Levels : int { minmax = 0, mse = 1, unbiased = 2 };

// One part (keys or values) of pages to quantize and pack.
struct EncodeRequest {
  const void* x;  // [pages, heads, page_size, head_dim], strides in elements, last axis contiguous
  DType dtype;
  int64_t page_stride, head_stride, token_stride;
  int pages, heads, page_size, head_dim;
  Part part;
  bool is_key;    // else values: rows are channels
  Levels levels;
  uint8_t* out;   // the part's first byte in page 0, head 0
  int64_t out_page_stride, out_head_stride;  // bytes
  int threads;
};

// Points whose nearest entries are asked for; everything is contiguous.
struct NearestRequest {
  const float* x;         // [groups, points, channels]
  const float* codebook;  // [groups, entries, channels]
  int32_t* out;           // [groups, points]
  int groups;
  int64_t points;
  int channels, entries, threads;
};

// One part of pages to code by the nearest entries of a codebook and to pack; it has no scales.
struct EncodeCodesRequest {
  const void* x;  // as in EncodeRequest
  DType dtype;
  int64_t page_stride, head_stride, token_stride;
  int pages, heads;
  CodePart part;  // its width a multiple of 16
  Codebook codebook;
  uint8_t* out;
  int64_t out_page_stride, out_head_stride;
  int threads;
};

// What tables are made of a codebook for: see tables.h.
enum class TableKind : int { values = 0, keys = 1, turned_keys = 2 };

struct TablesRequest {
  Codebook codebook;  // at most 256 entries
  int width;          // channels that its groups cover
  TableKind kind;
  int pairs;          // of channels that turn together
  uint8_t* out;       // null: only their size is asked for
  int threads;
};

struct Kernels {
  const char* name;
  bool lookups;  // for AttendRequest
  void (*attend)(const AttendRequest&);
  void (*encode)(const EncodeRequest&);
  void (*nearest)(const NearestRequest&);
  void (*encode_codes)(const EncodeCodesRequest&);
  size_t (*tabulate)(const TablesRequest&);  // bytes of the tables; null where nothing is looked up
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512Vnni, kAvx512, kAmx;
bool has_avx2(), has_avx512(), has_vbmi(), has_matrix();  // what the last four need
#endif

// Calls body(item) for item = 0 ... items - 1 on up to `threads` threads, which take items in turn.
void parallel_for(int items, int threads, void (*body)(void* context, int item), void* context);

template <class Body>
void parallel_for(int items, int threads, const Body& body) {
  parallel_for(
      items, threads, [](void* context, int item) { (*static_cast<const Body*>(context))(item); },
      const_cast<Body*>(&body));
}

}  // namespace bitkv
