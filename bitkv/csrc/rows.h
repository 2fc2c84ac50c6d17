// What kernels for rows of numbers share: their sizes, a half of a page with its places worked out, a thread's room,
// and loops whose indices are constants.
//
// No include guard: attend.h includes this once.

namespace bitkv::BITKV_ISA {

constexpr int kRows = 32;      // query rows that share a pass over a page
constexpr int kColumns = 256;  // channels of a head or tokens of a page, at most
constexpr int kWidth = 512;    // numbers of a token that pages code, at most: a linear map may give more than channels
constexpr int kTokens = 128;   // tokens of a page, at most
constexpr int kTileTokens = 2048;        // whose scores are kept together, at most
constexpr int kShortTile = 1024;         // the same where a page is many bytes, or keys are turned
constexpr int kTile = kTileTokens + 64;  // between rows of them: powers of two would share cache sets
constexpr int kUnitColumns = 64, kUnitBlocks = kColumns / kUnitColumns;  // where numbers have several units
constexpr int kNumbers = kColumns + 64;  // between rows of bytes: sixteen are stored with 48 zeros behind them
constexpr int kMaxH = kAccumulators >= 16 ? 8 : 4;  // rows that are multiplied at once

// Calls fn(0), ..., fn(N - 1) with constants. Sums live in arrays, which stay in registers only where
// every index is a constant.
template <int N, class Fn>
[[gnu::always_inline]] inline void repeat(const Fn& fn) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) { (fn(std::integral_constant<int, i>()), ...); }
  (std::make_integer_sequence<int, N>());
}

// Calls fn with the first of the rows to take next and their number, a constant: 8, 4, 2 or 1.
template <class Fn>
inline void by_rows(int rows, const Fn& fn) {
  int row = 0;
  if constexpr (kMaxH >= 8) for (; row + 8 <= rows; row += 8) fn(row, std::integral_constant<int, 8>());
  for (; row + 4 <= rows; row += 4) fn(row, std::integral_constant<int, 4>());
  if (row + 2 <= rows) { fn(row, std::integral_constant<int, 2>()); row += 2; }
  if (row < rows) fn(row, std::integral_constant<int, 1>());
}

// The scales of a row of columns.
struct ColumnScales {
  const uint16_t* scale;
  const uint16_t* zero;
};

// A part with everything that would otherwise be divided out for each page.
struct Half {
  int bits, rows, columns, group, groups, blocks, vectors;
  bool row_scales, is_raw, tables, tail;
  DType dtype;
  size_t block_bytes, scales_at, zeros_at, tail_at, nbytes;

  Half(const Part& p, bool lookups)
      : bits(p.bits), rows(p.rows), columns(p.columns), group(p.group),
        groups(p.is_raw() ? 1 : (p.row_scales ? p.columns : p.rows) / p.group), blocks(p.blocks()),
        vectors(p.is_raw() ? 0 : p.vectors()), row_scales(p.row_scales), is_raw(p.is_raw()), 
        // a table must serve 64 rows to be worth making
        tables(lookups && p.bits == 1 && !p.row_scales && p.group >= 64), tail(p.has_tail()),
        dtype(p.dtype), block_bytes(p.block_bytes()), scales_at(p.code_bytes()),
        zeros_at(p.code_bytes() + 2 * size_t(p.num_scales())), tail_at(p.blocks() * p.block_bytes()),
        nbytes(p.nbytes()) {}

  const uint16_t* scales(const uint8_t* data) const { return reinterpret_cast<const uint16_t*>(data + scales_at); }
  const uint16_t* zeros(const uint8_t* data) const { return reinterpret_cast<const uint16_t*>(data + zeros_at); }
  ColumnScales of_columns(const uint8_t* data, int g) const { return {scales(data) + g * columns, zeros(data) + g * columns}; }
  // whether sums over its columns are those of integers
  bool is_integer() const { return !is_raw && bits < 8; }
  // how often the loops over its codes, for up to kMaxH rows, and what lies between them ask for more to be fetched
  int steps() const { return int(scales_at / 64); }
  int pauses() const { return is_integer() ? groups + 1 : 0; }
};

// Room that grows, aligned so that no vector in it crosses a cache line; what it held is lost when it grows.
template <class T>
class Room {
 public:
  ~Room() { ::operator delete(data_, std::align_val_t(64)); }
  Room() = default;
  Room(const Room&) = delete;

  T* of(size_t size) {
    if (size > size_) {
      ::operator delete(data_, std::align_val_t(64));
      data_ = nullptr, size_ = 0;
      data_ = static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t(64)));
      size_ = size;
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
};

// Rows of numbers are rounded to multiples of a unit, one for each block of a row's columns.
struct Units {
  float unit[kUnitBlocks][kRows], inverse[kUnitBlocks][kRows];
  bool is_coarse[kRows];  // whether what rounding leaves matters
};

// Rows of numbers to multiply with codes: bytes, and a second term for what rounding left.
struct Numbers {
  alignas(64) int8_t high[kMaxH][kNumbers], low[kMaxH][kNumbers];
  float unit[kUnitBlocks][kMaxH], low_unit[kUnitBlocks][kMaxH];  // what the bytes are multiples of
  float offset[kMaxH], low_offset[kMaxH];                       // what turns sums of codes into sums of values
};

struct Scratch {
  Numbers numbers;
  alignas(64) uint8_t tables[kMaxH][kColumns * 4];  // for 1-bit codes: the sums of each choice of a quad
  Units of_weights, of_queries;
  alignas(64) float x[kRows][kColumns], out[kRows][kWidth];
  alignas(64) float scaled[kMaxH][kColumns];
  alignas(64) float scores[kRows][kTile], weights[kRows][kTile];
  alignas(64) float mapped[kRows][kWidth];                                    // queries as pages need them
  alignas(64) float decoded[kTokens * kWidth], restored[kTokens * kColumns];  // tokens of a page
  float offset[kRows];
};

// Rows of a result [h][stride], set or added to.
struct Result {
  float* data;
  int stride;
  bool add;

  Result from(int h) const { return {data + h * stride, stride, add}; }
  void put(int h, int block, F value) const {
    float* p = data + h * stride + block * kLanes;
    store(p, add ? load(p) + value : value);
  }
};

template <int H>
inline void sums_of(const F (&x)[H], float* out) {
  if constexpr (H % 4 == 0) {
    for (int i = 0; i < H; i += 4) sums({x[i], x[i + 1], x[i + 2], x[i + 3]}, out + i);
  } else {
    for (int i = 0; i < H; ++i) out[i] = sum(x[i]);
  }
}

template <int H>
inline void maxima_of(const F (&x)[H], float* out) {
  if constexpr (H % 4 == 0) {
    for (int i = 0; i < H; i += 4) maxima({x[i], x[i + 1], x[i + 2], x[i + 3]}, out + i);
  } else {
    for (int i = 0; i < H; ++i) out[i] = max(x[i]);
  }
}

}  // namespace bitkv::BITKV_ISA
