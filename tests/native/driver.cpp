// Calls attend and encode of every instruction set on buffers of exactly the size they may touch, for
// AddressSanitizer and UBSan to watch. What a call may not read lies outside its buffers or is poisoned.
// Results must be finite; whether they are right is the business of tests/test_cpu.py.
#include <sanitizer/asan_interface.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kernels.h"

using namespace bitkv;

namespace {

std::mt19937 random_bits(1);

int pick(std::initializer_list<int> choices) { return choices.begin()[random_bits() % choices.size()]; }
int below(int n) { return int(random_bits() % unsigned(n)); }

// Heap memory without slack: std::vector may have some.
template <class T>
struct Exact {
  size_t size;
  std::unique_ptr<T[]> data;

  explicit Exact(size_t n) : size(n), data(new T[n]()) {}
  T* get() const { return data.get(); }
  T& operator[](size_t i) const { return data[i]; }
};

// A float16 or bfloat16 of magnitude below 2, or the bytes of such a float32.
void put_number(uint8_t* at, DType dtype) {
  const float x = float(int(random_bits() % 4096) - 2048) / 1024;
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if (dtype == DType::f32) {
    std::memcpy(at, &u, 4);
    return;
  }
  const uint16_t bf16 = uint16_t(u >> 16), f16 = uint16_t(random_bits() & 0xbfff);
  std::memcpy(at, dtype == DType::bf16 ? &bf16 : &f16, 2);
}

void fill_numbers(uint8_t* at, size_t count, DType dtype) {
  for (size_t i = 0; i < count; ++i) put_number(at + i * size_of(dtype), dtype);
}

// Random codes, scales and zero points.
void fill_part(uint8_t* at, const Part& part) {
  if (part.is_raw()) return fill_numbers(at, part.nbytes() / size_of(part.dtype), part.dtype);
  for (size_t i = 0; i < part.code_bytes(); ++i) at[i] = uint8_t(random_bits());
  uint8_t* scales = at + part.code_bytes();
  fill_numbers(scales, size_t(2) * part.num_scales(), DType::f16);
  for (int i = 0; i < part.num_scales(); ++i) {  // which are positive
    scales[2 * i] |= 1;
    scales[2 * i + 1] &= 0x7f;
  }
}

int group_of(int extent) {
  const int group = pick({32, 64, 128, extent});
  return group <= extent && extent % group == 0 ? group : extent;
}

Part random_part(bool is_key, int page_size, int head_dim) {
  const int rows = is_key ? page_size : head_dim, columns = is_key ? head_dim : page_size;
  const int bits = pick({1, 1, 2, 2, 4, 8, 16, 32});
  const DType dtype = bits == 32 ? DType::f32 : DType(below(2));
  const bool row_scales = is_key && below(2);
  const int extent = is_key && !row_scales ? page_size : head_dim;
  return {bits, rows, columns, group_of(extent), row_scales, dtype};
}

void fail(const char* what, const Kernels& kernels, const Part& part) {
  std::fprintf(stderr, "%s: %s is not finite (%d bits, %d x %d, group %d)\n", kernels.name, what, part.bits,
               part.rows, part.columns, part.group);
  std::exit(1);
}

// A half of a page with all it needs: memory that the kernels read lives as long as this does.
struct RandomSide {
  Side side{};
  std::vector<Exact<float>> memory;
  std::unique_ptr<Exact<uint8_t>> tables;

  const float* numbers(size_t count) {
    memory.emplace_back(count);
    fill_numbers(reinterpret_cast<uint8_t*>(memory.back().get()), count, DType::f32);
    return memory.back().get();
  }

  RandomSide(bool is_key, int page_size, int head_dim, int kv_heads) {
    side.width = head_dim, side.restore_heads = 1, side.factor = 1;
    side.has_codebook = below(2);
    side.affine = random_part(is_key, page_size, head_dim);
    if (below(4) == 0) {
      side.restore_heads = pick({1, kv_heads});
      if (side.has_codebook) side.width = pick({head_dim, 48});
      side.restore = numbers(size_t(side.restore_heads) * head_dim * side.width);
    }
    if (side.has_codebook) {
      const int bits = pick({8, 8, 8, 1, 4, 7, 9, 10, 16}), channels = pick({1, 2, 4, 8, 16});
      side.codes = {bits, channels, side.width, page_size, below(3)};
      const int heads = pick({1, kv_heads}), groups = pick({1, side.codes.groups()});
      const size_t entries = size_t(1) << bits;
      side.codebook = {numbers(heads * groups * entries * channels), heads, groups, int(entries), channels};
    }
    if (is_key && below(2)) {
      side.pairs = pick({head_dim / 2, head_dim / 2, 5});
      side.inv_freq = numbers(side.pairs);
    }
  }

  // Tables to look codes up in, where there are such kernels.
  void tabulate(const Kernels& kernels, bool is_key) {
    const bool turns = side.inv_freq != nullptr;
    const bool halves = 2 * side.pairs == side.width && side.pairs % kLanes == 0 && !side.restore;
    if (!kernels.tabulate || !side.has_codebook || side.codes.bits > 8 || (turns && !halves)) return;
    const TableKind kind = !is_key ? TableKind::values : turns ? TableKind::turned_keys : TableKind::keys;
    TablesRequest request{side.codebook, side.width, kind, turns ? side.pairs : 0, nullptr, 1};
    tables = std::make_unique<Exact<uint8_t>>(kernels.tabulate(request));
    request.out = tables->get();
    kernels.tabulate(request);
    side.tables = tables->get();
  }

  void fill(uint8_t* at) const {
    if (!side.has_codebook) return fill_part(at, side.affine);
    for (size_t i = 0; i < side.codes.code_bytes(); ++i) at[i] = uint8_t(random_bits());
    fill_numbers(at + side.codes.code_bytes(), size_t(side.codes.scales) * side.codes.page_size, DType::f16);
  }
};

bool finite(const uint8_t* x, DType dtype) {
  uint32_t u = 0;
  std::memcpy(&u, x, size_of(dtype));
  const uint32_t exponent = dtype == DType::f32 ? 0x7f800000u : dtype == DType::bf16 ? 0x7f80u : 0x7c00u;
  return (u & exponent) != exponent;
}

void attend_once(const Kernels& kernels) {
  AttendRequest r{};
  r.page_size = pick({64, 128});
  r.head_dim = pick({64, 80, 96, 128, 256});
  r.dtype = DType(below(3)), r.hot_dtype = DType(below(3));
  r.batch = 1 + below(3), r.kv_heads = 1 + below(3), r.queries = pick({1, 1, 1, 2, 5, 33});
  RandomSide key(true, r.page_size, r.head_dim, r.kv_heads), value(false, r.page_size, r.head_dim, r.kv_heads);
  key.tabulate(kernels, true), value.tabulate(kernels, false);
  r.key = key.side, r.value = value.side;
  r.heads = r.kv_heads * (r.queries > 5 ? pick({1, 3}) : pick({1, 3, 4, 7, 8, 16, 40}));
  r.num_sink_tokens = pick({0, 1, 4, 70}), r.scale = 1 / std::sqrt(float(r.head_dim));
  r.window = pick({0, 1}) ? int64_t(1) << 62 : pick({1, 60, 200});
  r.softcap = float(pick({0, 0, 2})), r.threads = pick({1, 2});

  r.table_width = below(9);
  const int num_pages = 1 + below(12), capacity = r.num_sink_tokens + pick({0, 1, 63, 64, 150});
  r.page_stride = int64_t(r.page_bytes());
  const size_t page_bytes = r.page_bytes(), row_bytes = size_t(r.head_dim) * size_of(r.hot_dtype);
  Exact<uint8_t> pool(num_pages * r.kv_heads * page_bytes);
  Exact<int32_t> table(size_t(r.batch) * r.table_width), packed_len(r.batch), hot_len(r.batch);
  std::vector<bool> used(num_pages);
  for (int b = 0; b < r.batch; ++b) {
    const int pages = below(r.table_width + 1);
    packed_len[b] = pages * r.page_size, hot_len[b] = below(3) ? below(capacity + 1) : pick({0, capacity});
    for (int i = 0; i < r.table_width; ++i) {
      int32_t& page = table[size_t(b) * r.table_width + i];
      page = i < pages ? below(num_pages) : 1 << 30;  // beyond a sequence's length anything may stand
      if (i < pages) used[page] = true;
    }
  }
  for (int i = 0; i < num_pages; ++i) {
    uint8_t* pages = pool.get() + i * r.kv_heads * page_bytes;
    for (int h = 0; h < r.kv_heads; ++h) {
      key.fill(pages + h * page_bytes);
      value.fill(pages + h * page_bytes + r.key.nbytes());
    }
    if (!used[i]) ASAN_POISON_MEMORY_REGION(pages, r.kv_heads * page_bytes);
  }

  // the last head of the last sequence ends where its capacity does
  const int gap = below(3);
  r.hot_head_stride = int64_t(capacity + gap) * r.head_dim;
  r.hot_batch_stride = r.hot_head_stride * r.kv_heads;
  const size_t hot_rows = size_t(r.batch) * r.kv_heads * (capacity + gap) - gap;
  Exact<uint8_t> hot_k(hot_rows * row_bytes), hot_v(hot_rows * row_bytes);
  for (const auto* hot : {&hot_k, &hot_v}) {
    fill_numbers(hot->get(), hot_rows * r.head_dim, r.hot_dtype);
    for (int b = 0; b < r.batch; ++b)
      for (int h = 0; h < r.kv_heads; ++h) {
        const size_t first = size_t(b * r.kv_heads + h) * (capacity + gap) + hot_len[b];
        const size_t end = std::min(hot_rows, size_t(b * r.kv_heads + h + 1) * (capacity + gap));
        ASAN_POISON_MEMORY_REGION(hot->get() + first * row_bytes, (end - first) * row_bytes);
      }
  }

  const size_t rows = size_t(r.batch) * r.heads * r.queries, size = rows * r.head_dim;
  Exact<uint8_t> q(size * size_of(r.dtype)), out(size * size_of(r.dtype));
  Exact<float> lse(rows);
  Exact<int64_t> positions(size_t(r.batch) * r.queries);
  fill_numbers(q.get(), size, r.dtype);
  for (int b = 0; b < r.batch; ++b)
    for (int i = 0; i < r.queries; ++i)
      positions[size_t(b) * r.queries + i] = below(packed_len[b] + hot_len[b] + 10) - 1;

  r.q = q.get(), r.out = out.get(), r.lse = lse.get(), r.positions = below(2) ? positions.get() : nullptr;
  r.pages = pool.get(), r.block_table = table.get(), r.packed_len = packed_len.get();
  r.hot_k = hot_k.get(), r.hot_v = hot_v.get(), r.hot_len = hot_len.get();
  r.lookups = kernels.lookups;
  kernels.attend(r);

  for (size_t i = 0; i < size; ++i)
    if (!finite(out.get() + i * size_of(r.dtype), r.dtype)) fail("an output", kernels, r.key.affine);
  for (size_t i = 0; i < rows; ++i)
    if (!(lse[i] < INFINITY)) fail("a log-sum-exp", kernels, r.key.affine);
  ASAN_UNPOISON_MEMORY_REGION(pool.get(), pool.size);
  for (const auto* hot : {&hot_k, &hot_v}) ASAN_UNPOISON_MEMORY_REGION(hot->get(), hot->size);
}

void encode_once(const Kernels& kernels) {
  EncodeRequest r{};
  r.page_size = pick({64, 128}), r.head_dim = pick({64, 80, 96, 128, 256});
  r.pages = 1 + below(3), r.heads = 1 + below(3), r.is_key = below(2);
  r.part = random_part(r.is_key, r.page_size, r.head_dim);
  r.dtype = r.part.is_raw() ? r.part.dtype : DType(below(3));
  r.levels = Levels(below(3)), r.threads = pick({1, 2});
  const int gap = 16 * below(3);  // between tokens, heads lie inside: [pages, page_size, heads, dim + gap]
  r.head_stride = r.head_dim + gap, r.token_stride = r.heads * r.head_stride;
  r.page_stride = r.page_size * r.token_stride;
  const size_t count = r.pages * r.page_stride - gap;
  Exact<uint8_t> x(count * size_of(r.dtype));
  fill_numbers(x.get(), count, r.dtype);
  for (int i = 0; i + 1 < r.pages * r.page_size * r.heads && gap; ++i)
    ASAN_POISON_MEMORY_REGION(x.get() + (i * r.head_stride + r.head_dim) * size_of(r.dtype),
                              gap * size_of(r.dtype));

  // the other half of each page may be on either side; nothing may be written there
  const size_t nbytes = r.part.nbytes(), before = below(2) * 256, stride = before + nbytes + 256;
  Exact<uint8_t> out(r.pages * r.heads * stride);
  r.out_head_stride = int64_t(stride), r.out_page_stride = r.heads * r.out_head_stride;
  ASAN_POISON_MEMORY_REGION(out.get(), out.size);
  for (int i = 0; i < r.pages * r.heads; ++i) ASAN_UNPOISON_MEMORY_REGION(out.get() + i * stride + before, nbytes);
  r.x = x.get(), r.out = out.get() + before;
  kernels.encode(r);

  for (int i = 0; i < r.pages * r.heads && !r.part.is_raw(); ++i)
    for (int s = 0; s < 2 * r.part.num_scales(); ++s)
      if (!finite(out.get() + i * stride + before + r.part.code_bytes() + 2 * s, DType::f16))
        fail("a scale", kernels, r.part);
  ASAN_UNPOISON_MEMORY_REGION(out.get(), out.size);
  ASAN_UNPOISON_MEMORY_REGION(x.get(), x.size);
}

void encode_codes_once(const Kernels& kernels) {
  EncodeCodesRequest r{};
  const int page_size = pick({64, 128}), width = pick({64, 80, 128}), channels = pick({1, 2, 4, 8, 16});
  const int bits = pick({1, 3, 4, 8, 10});
  r.part = {bits, channels, width, page_size, 0};
  r.pages = 1 + below(3), r.heads = 1 + below(3), r.dtype = DType(below(3)), r.threads = pick({1, 2});
  r.token_stride = width, r.head_stride = page_size * width, r.page_stride = r.heads * r.head_stride;
  Exact<uint8_t> x(r.pages * r.page_stride * size_of(r.dtype));
  fill_numbers(x.get(), r.pages * r.page_stride, r.dtype);
  const int heads = pick({1, r.heads}), groups = pick({1, r.part.groups()}), entries = 1 << bits;
  Exact<float> codebook(size_t(heads) * groups * entries * channels);
  fill_numbers(reinterpret_cast<uint8_t*>(codebook.get()), codebook.size, DType::f32);
  r.codebook = {codebook.get(), heads, groups, entries, channels};
  Exact<uint8_t> out(r.pages * r.heads * r.part.nbytes());
  r.x = x.get(), r.out = out.get();
  r.out_head_stride = int64_t(r.part.nbytes()), r.out_page_stride = r.heads * r.out_head_stride;
  kernels.encode_codes(r);
}

void nearest_once(const Kernels& kernels) {
  NearestRequest r{};
  r.groups = 1 + below(3), r.points = pick({1, 63, 64, 65, 2100});
  r.channels = pick({1, 2, 5, 8, 32}), r.entries = pick({1, 3, 16, 255}), r.threads = pick({1, 2});
  Exact<float> x(size_t(r.groups) * r.points * r.channels), codebook(size_t(r.groups) * r.entries * r.channels);
  Exact<int32_t> out(size_t(r.groups) * r.points);
  for (const auto* numbers : {&x, &codebook})
    fill_numbers(reinterpret_cast<uint8_t*>(numbers->get()), numbers->size, DType::f32);
  r.x = x.get(), r.codebook = codebook.get(), r.out = out.get();
  kernels.nearest(r);
  for (size_t i = 0; i < out.size; ++i)
    if (out[i] < 0 || out[i] >= r.entries) std::exit(1);
}

}  // namespace

// Arguments: an instruction set and the number of calls.
int main(int argc, char** argv) {
  if (argc != 3) return 2;
  std::vector<const Kernels*> all{&kPortable};
#if defined(__x86_64__)
  if (has_avx2()) all.push_back(&kAvx2);
#if defined(WITH_AVX512)
  if (has_matrix()) all.push_back(&kAmx);
  if (has_vbmi()) all.push_back(&kAvx512);
  all.push_back(&kAvx512Vnni);
#endif
#endif
  for (const Kernels* kernels : all) {
    if (std::strcmp(kernels->name, argv[1])) continue;
    for (int i = 0; i < std::atoi(argv[2]); ++i) {
      attend_once(*kernels), encode_once(*kernels);
      if (i % 3 == 0) encode_codes_once(*kernels), nearest_once(*kernels);
    }
    return 0;
  }
  return 2;
}
