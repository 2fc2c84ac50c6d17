// The bytes of a page, as kernels see them: bitkv/pages in C++, for the layout "lanes".
//
// Rows lie in blocks of 16, one row in each lane of a vector. Below 16 bits a block is a run of 64-byte
// vectors: lane r holds 4 bytes of row r, and the code at bit position p * bits of byte k of vector n is
// column n * (32 / bits) + 4p + k. So four neighbouring columns of 16 rows meet four numbers in one
// byte dot product and no sum ever crosses lanes. Where a row of 1-bit codes leaves 16 columns over
// (head_dim 80), two neighbouring blocks share a vector, after all others: positions 0-3, then 4-7.
// From 16 bits on a block is column after column of 16 values.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bitkv {

constexpr int kLanes = 16;

enum class DType : int { f16 = 0, bf16 = 1, f32 = 2 };

constexpr int size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// The key half or the value half of a page. Keys: rows = tokens; values: rows = channels.
struct Part {
  int bits;          // 1, 2, 4, 8 for codes; 16 or 32 for values of `dtype`
  int rows, columns;
  int group;         // rows that share a row of scales; with row_scales, columns that share a scale
  bool row_scales;   // per-token keys: scales [columns / group][rows]; else [rows / group][columns]
  DType dtype;

  bool is_raw() const { return bits >= 16; }
  int blocks() const { return rows / kLanes; }
  int columns_per_vector() const { return 32 / bits; }
  int vectors() const { return columns / columns_per_vector(); }  // whole ones, in a block
  bool has_tail() const { return !is_raw() && columns % columns_per_vector() != 0; }
  size_t block_bytes() const {
    return is_raw() ? size_t(columns) * kLanes * (bits / 8) : size_t(vectors()) * 64;
  }
  size_t code_bytes() const { return size_t(rows) * columns * bits / 8; }
  int num_scales() const { return is_raw() ? 0 : rows * columns / group; }
  size_t nbytes() const { return code_bytes() + 4 * size_t(num_scales()); }

  const uint16_t* scales(const uint8_t* part) const {
    return reinterpret_cast<const uint16_t*>(part + code_bytes());
  }
  const uint16_t* zero_points(const uint8_t* part) const { return scales(part) + num_scales(); }
};

// A half of a page whose codes are indices into a codebook: bitkv/pages/codebook.py in C++. An index lies
// in planes of 8, 4, 2 and 1 bits, lowest bits and widest plane first; a plane holds group after group and
// of a group all tokens, token j * W + w at position j of byte w of its W bytes.
struct CodePart {
  int bits;      // of an index, 1 to 16
  int channels;  // that share an index
  int width, page_size;
  int scales;    // a token: 0, 1 (a scale) or 2 (a zero point too)

  int groups() const { return width / channels; }
  size_t code_bytes() const { return size_t(groups()) * page_size * bits / 8; }
  size_t nbytes() const { return code_bytes() + 2 * size_t(scales) * page_size; }

  const uint16_t* scale(const uint8_t* part) const { return reinterpret_cast<const uint16_t*>(part + code_bytes()); }
  const uint16_t* zero_point(const uint8_t* part) const { return scale(part) + page_size; }

  // Calls fn(bits of the plane, how many bits lie in planes before it, where the plane begins).
  template <class Fn>
  void each_plane(const Fn& fn) const {
    int shift = 0;
    size_t begin = 0;
    for (int left = bits; left > 0;) {
      const int plane = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
      fn(plane, shift, begin);
      shift += plane, left -= plane;
      begin += size_t(groups()) * page_size * plane / 8;
    }
  }
};

// Float32 [heads, groups, entries, channels], one head or group serving all where there is but one.
struct Codebook {
  const float* data;
  int heads, groups, entries, channels;

  const float* of(int head, int group) const {
    return data + (size_t(head % heads) * groups + group % groups) * entries * channels;
  }
};

}  // namespace bitkv
