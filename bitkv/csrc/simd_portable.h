// Sixteen lanes as four vectors of GCC's and Clang's own, which become SSE2, NEON or whatever the CPU has. No product
// is fused with a sum (-ffp-contract=off), so every CPU gives the same bits.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

#include "page.h"

namespace bitkv::BITKV_ISA {

constexpr int kAccumulators = 4;
constexpr int kParts = 4;

using Float4 [[gnu::vector_size(16)]] = float;
using Int4 [[gnu::vector_size(16)]] = int32_t;
using Word4 [[gnu::vector_size(16)]] = uint32_t;
using Short8 [[gnu::vector_size(16)]] = int16_t;
using UShort8 [[gnu::vector_size(16)]] = uint16_t;
using UShort4 [[gnu::vector_size(8)]] = uint16_t;
using Bytes4 [[gnu::vector_size(4)]] = uint8_t;

struct F { Float4 v[kParts]; };
struct I { Int4 v[kParts]; };
struct B { Word4 v[kParts]; };

// Written out, not a loop: parts stay in registers only where every index is a constant.
template <class R, class Fn>
[[gnu::always_inline]] inline R each(const Fn& fn) {
  return {fn(0), fn(1), fn(2), fn(3)};
}
// numbers 4 * part ... of p
template <class V, class T>
[[gnu::always_inline]] inline V read(const T* p, int part) {
  V r;
  std::memcpy(&r, p + part * 4, sizeof r);
  return r;
}
template <class To, class From>
[[gnu::always_inline]] inline To as(const From& x) { return std::bit_cast<To>(x); }

// nearest, ties to even, for numbers below 2^22: adding 1.5 * 2^23 leaves no room for a fraction
inline Float4 nearest(Float4 x) { return (x + 0x1.8p23f) - 0x1.8p23f; }
inline Float4 abs(Float4 x) { return as<Float4>(as<Word4>(x) & 0x7fffffffu); }
inline Float4 half_to_float(Word4 h) {
  const Word4 sign = (h & 0x8000u) << 16, magnitude = (h & 0x7fffu) << 13;
  // subnormals too: the exponent is corrected by a multiplication, which is exact
  const Word4 finite = as<Word4>(as<Float4>(magnitude) * 0x1p112f);
  return as<Float4>(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
}
inline Word4 float_to_half(Float4 f) {  // nearest, ties to even; finite numbers
  const Float4 x = abs(f);
  const Word4 bits = as<Word4>(x);
  const Word4 normal = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1)) >> 13;
  // below 2^-14 a half counts multiples of 2^-24, and adding 2^-1 leaves just them in a float
  const Word4 subnormal = as<Word4>(x + 0.5f) - 0x3f000000u;
  const Word4 magnitude = x < 0x1p-14f ? subnormal : normal;
  return ((as<Word4>(f) >> 16) & 0x8000u) | (x >= 65520.0f ? Word4{} + 0x7c00u : magnitude);
}

inline F load(const float* p) { return each<F>([&](int i) { return read<Float4>(p, i); }); }
inline Word4 load_shorts(const uint16_t* p, int part) { return __builtin_convertvector(read<UShort4>(p, part), Word4); }
inline F load_half(const uint16_t* p) { return each<F>([&](int i) { return half_to_float(load_shorts(p, i)); }); }
inline F load(const uint16_t* p, DType dtype) {
  if (dtype == DType::f16) return load_half(p);
  return each<F>([&](int i) { return as<Float4>(load_shorts(p, i) << 16); });
}
inline void store(float* p, const F& x) { std::memcpy(p, x.v, sizeof x.v); }
inline void store_half(uint16_t* p, const F& x) {
  for (int i = 0; i < kParts; ++i) {
    const UShort4 half = __builtin_convertvector(float_to_half(x.v[i]), UShort4);
    std::memcpy(p + i * 4, &half, sizeof half);
  }
}
inline F set(float x) { return each<F>([&](int) { return Float4{x, x, x, x}; }); }
inline F operator+(const F& a, const F& b) { return each<F>([&](int i) { return a.v[i] + b.v[i]; }); }
inline F operator-(const F& a, const F& b) { return each<F>([&](int i) { return a.v[i] - b.v[i]; }); }
inline F operator*(const F& a, const F& b) { return each<F>([&](int i) { return a.v[i] * b.v[i]; }); }
inline F operator/(const F& a, const F& b) { return each<F>([&](int i) { return a.v[i] / b.v[i]; }); }
inline F fma(const F& a, const F& b, const F& c) { return each<F>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
inline F max(const F& a, const F& b) { return each<F>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline F min(const F& a, const F& b) { return each<F>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline F abs(const F& a) { return each<F>([&](int i) { return abs(a.v[i]); }); }
inline F round(const F& a) { return each<F>([&](int i) { return nearest(a.v[i]); }); }
inline F select_less(const F& a, const F& b, const F& x, const F& y) {
  return each<F>([&](int i) { return a.v[i] < b.v[i] ? x.v[i] : y.v[i]; });
}
inline float sum(const F& a) {
  const Float4 s = (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
  return (s[0] + s[2]) + (s[1] + s[3]);
}
inline float max(const F& a) {
  const auto larger = [](auto x, auto y) { return x > y ? x : y; };
  const Float4 s = larger(larger(a.v[0], a.v[1]), larger(a.v[2], a.v[3]));
  return larger(larger(s[0], s[1]), larger(s[2], s[3]));
}
// a * 2^n, n being in the low bits of the float n
inline F times_power_of_two(const F& a, const F& n) {
  return each<F>([&](int i) { return as<Float4>(as<Word4>(a.v[i]) + (as<Word4>(n.v[i]) << 23)); });
}
inline F round_to_half(const F& a) { return each<F>([&](int i) { return half_to_float(float_to_half(a.v[i])); }); }

inline Float4 low_halves(Float4 a, Float4 b) { return Float4{a[0], b[0], a[1], b[1]}; }
inline Float4 high_halves(Float4 a, Float4 b) { return Float4{a[2], b[2], a[3], b[3]}; }
inline void transpose(Float4& a, Float4& b, Float4& c, Float4& d) {
  const Float4 first = low_halves(a, c), second = low_halves(b, d), third = high_halves(a, c), fourth = high_halves(b, d);
  a = low_halves(first, second), b = high_halves(first, second);
  c = low_halves(third, fourth), d = high_halves(third, fourth);
}
inline void transpose(F (&x)[kLanes]) {
  for (int i = 0; i < kParts; ++i) {
    for (int j = 0; j < kParts; ++j) transpose(x[4 * i].v[j], x[4 * i + 1].v[j], x[4 * i + 2].v[j], x[4 * i + 3].v[j]);
  }
  for (int i = 0; i < kParts; ++i) {
    for (int j = 0; j < i; ++j) for (int k = 0; k < 4; ++k) std::swap(x[4 * i + k].v[j], x[4 * j + k].v[i]);
  }
}

inline I zero_int() { return {}; }
inline I to_int(const F& a) { return each<I>([&](int i) { return __builtin_convertvector(nearest(a.v[i]), Int4); }); }
inline F to_float(const I& a) { return each<F>([&](int i) { return __builtin_convertvector(a.v[i], Float4); }); }
inline I operator+(const I& a, const I& b) { return each<I>([&](int i) { return a.v[i] + b.v[i]; }); }
inline I shift_left(const I& a, int by) { return each<I>([&](int i) { return as<Int4>(as<Word4>(a.v[i]) << by); }); }
inline I load_int(const void* p) { I r; std::memcpy(r.v, p, sizeof r.v); return r; }
inline void store_int(void* p, const I& a) { std::memcpy(p, a.v, sizeof a.v); }
inline int sum(const I& a) {
  const Int4 s = (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
  return (s[0] + s[2]) + (s[1] + s[3]);
}
inline Bytes4 low_bytes(Int4 x) { return __builtin_convertvector(x, Bytes4); }
inline void store_bytes(int8_t* p, const I& a) {
  for (int i = 0; i < kParts; ++i) {
    const Bytes4 bytes = low_bytes(a.v[i]);
    std::memcpy(p + i * 4, &bytes, sizeof bytes);
  }
}

inline B load_bytes(const void* p) { B r; std::memcpy(r.v, p, sizeof r.v); return r; }
inline void store_bytes(void* p, const B& a) { std::memcpy(p, a.v, sizeof a.v); }
inline B bits_at(const B& a, int by, uint8_t mask) {
  return each<B>([&](int i) { return (a.v[i] >> by) & (0x01010101u * mask); });
}
template <int kBits>
inline B shifted(const B& a) { return each<B>([&](int i) { return a.v[i] >> kBits; }); }
inline F byte_to_float(const B& a, int k) {
  return each<F>([&](int i) { return __builtin_convertvector(as<Int4>((a.v[i] >> (8 * k)) & 255), Float4); });
}

// acc + both 16-bit numbers of each lane
inline Int4 add_shorts(Int4 acc, Short8 x) { return acc + (as<Int4>(as<Word4>(x) << 16) >> 16) + (as<Int4>(x) >> 16); }

// Sums of products, in pairs of 16 bits: of all codes of a word, below 16 each, they cannot overflow.
struct Products { Short8 v[kParts]; };
inline Products start(const I&) { return {}; }
inline Products dot(const Products& sums, const B& codes, Short8 even, Short8 odd) {
  return each<Products>([&](int i) {
    const UShort8 pairs = as<UShort8>(codes.v[i]);
    return sums.v[i] + as<Short8>(pairs & 255) * even + as<Short8>(pairs >> 8) * odd;
  });
}
inline Products dot(const Products& sums, const B& codes, int32_t four) {
  const Short8 numbers = as<Short8>(Int4{four, four, four, four});
  return dot(sums, codes, (numbers << 8) >> 8, numbers >> 8);
}
inline Products dot_unsigned(const Products& sums, const B& codes, int32_t four) {
  const UShort8 numbers = as<UShort8>(Int4{four, four, four, four});
  return dot(sums, codes, as<Short8>(numbers & 255), as<Short8>(numbers >> 8));
}
inline I finish(const I& acc, const Products& sums) {
  return each<I>([&](int i) { return add_shorts(acc.v[i], sums.v[i]); });
}

// sixteen numbers of each of four vectors as bytes, in order
template <bool kUnsigned>
inline B pack(const I& a, const I& b, const I& c, const I& d) {
  constexpr int low = kUnsigned ? 0 : -128, high = kUnsigned ? 255 : 127;
  B r;
  const I* const from[] = {&a, &b, &c, &d};
  for (int i = 0; i < kParts; ++i) {
    Bytes4 bytes[kParts];
    for (int j = 0; j < kParts; ++j) {
      const Int4 x = from[i]->v[j], y = x < low ? Int4{} + low : x;
      bytes[j] = low_bytes(y > high ? Int4{} + high : y);
    }
    std::memcpy(&r.v[i], bytes, sizeof bytes);
  }
  return r;
}
// acc + the bytes of each lane
template <bool kUnsigned>
inline I add_bytes(const I& acc, const B& a) {
  return each<I>([&](int i) {
    const UShort8 pairs = as<UShort8>(a.v[i]);
    if constexpr (kUnsigned) return add_shorts(acc.v[i], as<Short8>((pairs & 255) + (pairs >> 8)));
    else return add_shorts(acc.v[i], (as<Short8>(pairs << 8) >> 8) + (as<Short8>(pairs) >> 8));
  });
}

// Lookups in 64 bytes are for AVX-512; what uses them is never made here and needs but names.
constexpr bool kHasLookup = false;
F sums_of_quads(F);
B entries(B);
B lookup(B, B);
B operator+(B, B);
void choices_of_quads(const int8_t*, uint8_t*);
void choices_of_sixteen_quads(const int8_t*, uint8_t*);

inline void sums(const F (&x)[4], float* out) { for (int i = 0; i < 4; ++i) out[i] = sum(x[i]); }
inline void maxima(const F (&x)[4], float* out) { for (int i = 0; i < 4; ++i) out[i] = max(x[i]); }

}  // namespace bitkv::BITKV_ISA
