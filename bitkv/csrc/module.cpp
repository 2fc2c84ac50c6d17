// The Python module bitkv._native; bitkv/_native.pyi says what its arguments are. Tensors come as
// addresses, because DLPack costs microseconds for each.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace nb = nanobind;

namespace bitkv {
namespace {

using Address = uintptr_t;
using PartNumbers = std::tuple<int, int, int, int, int, int>;

template <class T>
T* at(Address address) { return reinterpret_cast<T*>(address); }

Part part_of(const PartNumbers& numbers) {
  const auto& [bits, rows, columns, group, row_scales, dtype] = numbers;
  return {bits, rows, columns, group, row_scales != 0, DType(dtype)};
}

using CodeNumbers = std::tuple<int, int, int, int, int>;
using CodebookTensor = std::tuple<Address, int, int, int, int>;  // data, heads, groups, entries, channels

CodePart code_part_of(const CodeNumbers& numbers) {
  const auto& [bits, channels, width, page_size, scales] = numbers;
  return {bits, channels, width, page_size, scales};
}

Codebook codebook_of(const CodebookTensor& tensor) {
  const auto& [data, heads, groups, entries, channels] = tensor;
  return {at<const float>(data), heads, groups, entries, channels};
}

const std::vector<const Kernels*>& supported() {
  static const std::vector<const Kernels*> all = [] {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    if (has_matrix()) found.push_back(&kAmx);
    if (has_vbmi()) found.push_back(&kAvx512);
    if (has_avx512()) found.push_back(&kAvx512Vnni);
    if (has_avx2()) found.push_back(&kAvx2);
#endif
    found.push_back(&kPortable);
    return found;
  }();
  return all;
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : supported()) names.emplace_back(kernels->name);
  return names;
}

const Kernels& find(std::string_view isa) {
  for (const Kernels* kernels : supported())
    if (isa == kernels->name) return *kernels;
  throw std::invalid_argument("this CPU has no instruction set '" + std::string(isa) + "'");
}

// Whoever calls owns the tensors' sizes; their contents are looked at here, so that no table of pages
// and no length leads outside them.
void check(const AttendRequest& r, int64_t num_pages, int64_t num_rows, int hot_capacity) {
  for (int b = 0; b < r.batch; ++b) {
    const int64_t row = r.hot_rows ? r.hot_rows[b] : b;
    if (row < 0 || row >= num_rows)
      throw std::invalid_argument("hot row " + std::to_string(row) + " of sequence " + std::to_string(b) +
                                  " is outside a hot window of " + std::to_string(num_rows) + " rows");
    const int pages = r.packed_len[b] / r.page_size;
    if (r.packed_len[b] < 0 || pages > r.table_width)
      throw std::invalid_argument("packed_len " + std::to_string(r.packed_len[b]) + " of sequence " +
                                  std::to_string(b) + " does not fit a block table of " +
                                  std::to_string(r.table_width) + " pages");
    if (r.hot_len[b] < 0 || r.hot_len[b] > hot_capacity)
      throw std::invalid_argument("hot_len " + std::to_string(r.hot_len[b]) + " of sequence " +
                                  std::to_string(b) + " does not fit a hot window of " +
                                  std::to_string(hot_capacity) + " tokens");
    const int32_t* table = r.block_table + int64_t(b) * r.table_width;
    bool inside = true;
    for (int i = 0; i < pages; ++i) inside &= table[i] >= 0 && table[i] < num_pages;
    if (!inside)
      throw std::invalid_argument("the block table of sequence " + std::to_string(b) +
                                  " names a page outside a pool of " + std::to_string(num_pages));
  }
}

using Queries = std::tuple<Address, Address, Address, Address, int>;  // q, out, lse, positions, dtype
using Shape = std::tuple<int, int, int, int, int>;                   // batch ... head_dim
using Parts = std::tuple<std::vector<int>, std::vector<int>>;  // PartNumbers or CodeNumbers
// codebook; restore, its heads and width; inv_freq, their number, factor; tables
using Shared = std::tuple<CodebookTensor, std::tuple<Address, int, int>, std::tuple<Address, int, float>, Address>;
using Shareds = std::tuple<Shared, Shared>;
using Pages = std::tuple<Address, int64_t, int64_t, int>;  // data, number, stride, page_size
using Tables = std::tuple<Address, int, Address>;  // block_table, its width, packed_len
// k, v, lengths, rows and their number, dtype, capacity, strides, sinks
using Hot = std::tuple<Address, Address, Address, Address, int64_t, int, int, int64_t, int64_t, int>;
using Scoring = std::tuple<float, int64_t, float>;  // scale, window, softcap

Side side_of(const std::vector<int>& part, const Shared& shared, int head_dim) {
  const auto& [codebook, map, turns, tables] = shared;
  const auto& [restore, restore_heads, width] = map;
  const auto& [inv_freq, pairs, factor] = turns;
  Side side{};
  side.has_codebook = part.size() == 5;
  if (side.has_codebook) side.codes = {part[0], part[1], part[2], part[3], part[4]};
  else side.affine = part_of({part[0], part[1], part[2], part[3], part[4], part[5]});
  side.codebook = codebook_of(codebook);
  side.restore = at<const float>(restore), side.restore_heads = restore_heads;
  side.width = restore ? width : head_dim;
  side.inv_freq = at<const float>(inv_freq), side.pairs = pairs, side.factor = factor;
  side.tables = at<const uint8_t>(tables);
  return side;
}

void attend(std::string_view isa, const Queries& q_tensors, const Shape& shape, const Parts& parts,
            const Shareds& shared, const Pages& pool, const Tables& tables, const Hot& hot, const Scoring& scoring, int threads) {
  const auto& [q, out, lse, positions, dtype] = q_tensors;
  const auto& [batch, heads, kv_heads, queries, head_dim] = shape;
  const auto& [pages, num_pages, page_stride, page_size] = pool;
  const auto& [block_table, table_width, packed_len] = tables;
  const auto& [hot_k, hot_v, hot_len, hot_rows, num_rows, hot_dtype, hot_capacity, batch_stride, head_stride, sinks] = hot;
  const auto& [scale, window, softcap] = scoring;
  const Kernels& kernels = find(isa);
  const AttendRequest request{
      .q = at<const void>(q),
      .out = at<void>(out),
      .lse = at<float>(lse),
      .dtype = DType(dtype),
      .batch = batch,
      .heads = heads,
      .kv_heads = kv_heads,
      .queries = queries,
      .head_dim = head_dim,
      .key = side_of(std::get<0>(parts), std::get<0>(shared), head_dim),
      .value = side_of(std::get<1>(parts), std::get<1>(shared), head_dim),
      .pages = at<const uint8_t>(pages),
      .page_stride = page_stride,
      .page_size = page_size,
      .block_table = at<const int32_t>(block_table),
      .table_width = table_width,
      .packed_len = at<const int32_t>(packed_len),
      .hot_k = at<const void>(hot_k),
      .hot_v = at<const void>(hot_v),
      .hot_rows = at<const int32_t>(hot_rows),
      .hot_dtype = DType(hot_dtype),
      .hot_batch_stride = batch_stride,
      .hot_head_stride = head_stride,
      .hot_len = at<const int32_t>(hot_len),
      .num_sink_tokens = sinks,
      .positions = at<const int64_t>(positions),
      .scale = scale,
      .window = window,
      .softcap = softcap,
      .threads = threads,
      .lookups = kernels.lookups,
  };
  const nb::gil_scoped_release released;
  check(request, num_pages, num_rows, hot_capacity);
  kernels.attend(request);
}

void encode(std::string_view isa, Address x, int dtype, std::tuple<int64_t, int64_t, int64_t> strides,
            std::tuple<int, int, int, int> shape, const PartNumbers& part, bool is_key, int levels,
            Address out, std::tuple<int64_t, int64_t> out_strides, int threads) {
  const auto [page_stride, head_stride, token_stride] = strides;
  const auto [pages, heads, page_size, head_dim] = shape;
  const auto [out_page_stride, out_head_stride] = out_strides;
  const EncodeRequest request{
      .x = at<const void>(x),
      .dtype = DType(dtype),
      .page_stride = page_stride,
      .head_stride = head_stride,
      .token_stride = token_stride,
      .pages = pages,
      .heads = heads,
      .page_size = page_size,
      .head_dim = head_dim,
      .part = part_of(part),
      .is_key = is_key,
      .levels = Levels(levels),
      .out = at<uint8_t>(out),
      .out_page_stride = out_page_stride,
      .out_head_stride = out_head_stride,
      .threads = threads,
  };
  const Kernels& kernels = find(isa);
  const nb::gil_scoped_release released;
  kernels.encode(request);
}

void nearest(std::string_view isa, Address x, Address codebook, Address out,
             std::tuple<int, int64_t, int, int> shape, int threads) {
  const auto [groups, points, channels, entries] = shape;
  const NearestRequest request{
      .x = at<const float>(x),
      .codebook = at<const float>(codebook),
      .out = at<int32_t>(out),
      .groups = groups,
      .points = points,
      .channels = channels,
      .entries = entries,
      .threads = threads,
  };
  const Kernels& kernels = find(isa);
  const nb::gil_scoped_release released;
  kernels.nearest(request);
}

void encode_codes(std::string_view isa, Address x, int dtype, std::tuple<int64_t, int64_t, int64_t> strides,
                  std::tuple<int, int> shape, const CodeNumbers& part, const CodebookTensor& codebook, Address out,
                  std::tuple<int64_t, int64_t> out_strides, int threads) {
  const auto [page_stride, head_stride, token_stride] = strides;
  const auto [pages, heads] = shape;
  const auto [out_page_stride, out_head_stride] = out_strides;
  const EncodeCodesRequest request{
      .x = at<const void>(x),
      .dtype = DType(dtype),
      .page_stride = page_stride,
      .head_stride = head_stride,
      .token_stride = token_stride,
      .pages = pages,
      .heads = heads,
      .part = code_part_of(part),
      .codebook = codebook_of(codebook),
      .out = at<uint8_t>(out),
      .out_page_stride = out_page_stride,
      .out_head_stride = out_head_stride,
      .threads = threads,
  };
  const Kernels& kernels = find(isa);
  const nb::gil_scoped_release released;
  kernels.encode_codes(request);
}

size_t tabulate(std::string_view isa, const CodebookTensor& codebook, int width, int kind, int pairs, Address out,
                int threads) {
  const Kernels& kernels = find(isa);
  if (!kernels.tabulate) return 0;
  const nb::gil_scoped_release released;
  return kernels.tabulate({codebook_of(codebook), width, TableKind(kind), pairs, at<uint8_t>(out), threads});
}

using Strides = std::tuple<int64_t, int64_t, int64_t>;  // batch, head, token; in bytes

// Tokens [batch, heads, count] of `bytes` each into the hot window, from its token `start` on.
void append(const std::tuple<Address, Address, Address>& hot, const Strides& hot_strides,
            const std::tuple<Address, Address>& tokens, const Strides& strides,
            std::tuple<int, int, int, int64_t> shape, int64_t start) {
  const auto& [hot_k, hot_v, hot_len] = hot;
  const auto& [k, v] = tokens;
  const auto [batch, heads, count, bytes] = shape;
  const auto [to_batch, to_head, to_token] = hot_strides;
  const auto [from_batch, from_head, from_token] = strides;
  for (int b = 0; b < batch; ++b) {
    for (int h = 0; h < heads; ++h)
      for (int t = 0; t < count; ++t) {
        const int64_t to = b * to_batch + h * to_head + (start + t) * to_token;
        const int64_t from = b * from_batch + h * from_head + t * from_token;
        std::memcpy(at<char>(hot_k + to), at<const char>(k + from), size_t(bytes));
        std::memcpy(at<char>(hot_v + to), at<const char>(v + from), size_t(bytes));
      }
    at<int32_t>(hot_len)[b] += count;
  }
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("isas", isas);
  m.def("attend", attend);
  m.def("encode", encode);
  m.def("encode_codes", encode_codes);
  m.def("nearest", nearest);
  m.def("tabulate", tabulate);
  m.def("append", append);
}

}  // namespace bitkv
