// Sixteen lanes as an array: plain C++ that compilers turn into whatever the target has.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

#include "page.h"

namespace bitkv::BITKV_ISA {

constexpr int kAccumulators = 4;

struct F { float v[kLanes]; };
struct I { int32_t v[kLanes]; };
struct B { uint32_t v[kLanes]; };

template <class R, class Fn>
inline R each(Fn fn) {
  R r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = fn(i);
  return r;
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  // subnormals too: the exponent is corrected by a multiplication, which is exact
  const float x = std::bit_cast<float>(magnitude << 13) * std::bit_cast<float>(0x77800000u);  // 2^112
  const uint32_t bits = magnitude >= 0x7c00u ? (0x7f800000u | (magnitude << 13)) : std::bit_cast<uint32_t>(x);
  return std::bit_cast<float>(bits | sign);
}
inline uint16_t float_to_half(float f) {  // nearest, ties to even; finite numbers
  const uint32_t u = std::bit_cast<uint32_t>(f), sign = (u >> 16) & 0x8000u;
  const float x = std::fabs(f);
  if (x >= 65520.0f) return uint16_t(sign | 0x7c00u);
  if (x < 0x1p-14f) return uint16_t(sign | uint32_t(std::nearbyint(x * 0x1p24f)));
  const uint32_t m = std::bit_cast<uint32_t>(x);
  return uint16_t(sign | ((m - 0x38000000u + 0xfffu + ((m >> 13) & 1)) >> 13));
}

inline F load(const float* p) { F r; std::memcpy(r.v, p, sizeof r.v); return r; }
inline F load(const uint16_t* p, DType dtype) {
  if (dtype == DType::f16) return each<F>([&](int i) { return half_to_float(p[i]); });
  return each<F>([&](int i) { return std::bit_cast<float>(uint32_t(p[i]) << 16); });
}
inline F load_half(const uint16_t* p) { return load(p, DType::f16); }
inline void store(float* p, const F& x) { std::memcpy(p, x.v, sizeof x.v); }
inline void store_half(uint16_t* p, const F& x) { for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(x.v[i]); }
inline F set(float x) { return each<F>([&](int) { return x; }); }
inline F operator+(const F& a, const F& b) { return each<F>([&](int i) { return a.v[i] + b.v[i]; }); }
inline F operator-(const F& a, const F& b) { return each<F>([&](int i) { return a.v[i] - b.v[i]; }); }
inline F operator*(const F& a, const F& b) { return each<F>([&](int i) { return a.v[i] * b.v[i]; }); }
inline F operator/(const F& a, const F& b) { return each<F>([&](int i) { return a.v[i] / b.v[i]; }); }
inline F fma(const F& a, const F& b, const F& c) { return each<F>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
inline F max(const F& a, const F& b) { return each<F>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline F min(const F& a, const F& b) { return each<F>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline F abs(const F& a) { return each<F>([&](int i) { return std::fabs(a.v[i]); }); }
// nearest, ties to even, for numbers below 2^22: adding 1.5 * 2^23 leaves no room for a fraction
inline float nearest(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }
inline F round(const F& a) { return each<F>([&](int i) { return nearest(a.v[i]); }); }
inline F select_less(const F& a, const F& b, const F& x, const F& y) {
  return each<F>([&](int i) { return a.v[i] < b.v[i] ? x.v[i] : y.v[i]; });
}
inline float sum(const F& a) {
  float s[8];
  for (int i = 0; i < 8; ++i) s[i] = a.v[i] + a.v[i + 8];
  for (int n = 4; n; n /= 2) for (int i = 0; i < n; ++i) s[i] += s[i + n];
  return s[0];
}
inline float max(const F& a) { return *std::max_element(a.v, a.v + kLanes); }
// a * 2^n, n being in the low bits of the float n
inline F times_power_of_two(const F& a, const F& n) {
  return each<F>([&](int i) {
    return std::bit_cast<float>(std::bit_cast<uint32_t>(a.v[i]) + (std::bit_cast<uint32_t>(n.v[i]) << 23));
  });
}
inline F round_to_half(const F& a) { return each<F>([&](int i) { return half_to_float(float_to_half(a.v[i])); }); }
inline void transpose(F (&x)[kLanes]) {
  for (int i = 1; i < kLanes; ++i) for (int j = 0; j < i; ++j) std::swap(x[i].v[j], x[j].v[i]);
}

inline I zero_int() { return {}; }
inline I to_int(const F& a) { return each<I>([&](int i) { return int32_t(nearest(a.v[i])); }); }
inline F to_float(const I& a) { return each<F>([&](int i) { return float(a.v[i]); }); }
inline I operator+(const I& a, const I& b) { return each<I>([&](int i) { return a.v[i] + b.v[i]; }); }
inline I shift_left(const I& a, int by) { return each<I>([&](int i) { return int32_t(uint32_t(a.v[i]) << by); }); }
inline I load_int(const void* p) { I r; std::memcpy(r.v, p, sizeof r.v); return r; }
inline void store_int(void* p, const I& a) { std::memcpy(p, a.v, sizeof a.v); }
inline int sum(const I& a) { int s = 0; for (int x : a.v) s += x; return s; }
inline void store_bytes(int8_t* p, const I& a) { for (int i = 0; i < kLanes; ++i) p[i] = int8_t(a.v[i]); }

inline B load_bytes(const void* p) { B r; std::memcpy(r.v, p, sizeof r.v); return r; }
inline B bits_at(const B& a, int by, uint8_t mask) {
  return each<B>([&](int i) { return (a.v[i] >> by) & (0x01010101u * mask); });
}
template <int kBits>
inline B shifted(const B& a) { return each<B>([&](int i) { return a.v[i] >> kBits; }); }
inline F byte_to_float(const B& a, int k) { return each<F>([&](int i) { return float((a.v[i] >> (8 * k)) & 255); }); }
inline I dot(const I& acc, const B& codes, int32_t four) {
  const uint32_t u = uint32_t(four);
  const int n[4] = {int8_t(u), int8_t(u >> 8), int8_t(u >> 16), int8_t(u >> 24)};
  return each<I>([&](int i) {
    const uint32_t c = codes.v[i];
    return acc.v[i] + int(c & 255) * n[0] + int((c >> 8) & 255) * n[1] + int((c >> 16) & 255) * n[2] + int(c >> 24) * n[3];
  });
}

inline I dot_unsigned(const I& acc, const B& codes, int32_t four) {
  const uint32_t u = uint32_t(four);
  const int n[4] = {int(u & 255), int((u >> 8) & 255), int((u >> 16) & 255), int(u >> 24)};
  return each<I>([&](int i) {
    const uint32_t c = codes.v[i];
    return acc.v[i] + int(c & 255) * n[0] + int((c >> 8) & 255) * n[1] + int((c >> 16) & 255) * n[2] + int(c >> 24) * n[3];
  });
}
// sixteen numbers of each of four vectors as bytes, in order
template <bool kUnsigned>
inline B pack(const I& a, const I& b, const I& c, const I& d) {
  constexpr int low = kUnsigned ? 0 : -128, high = kUnsigned ? 255 : 127;
  uint8_t bytes[64];
  for (int i = 0; i < 64; ++i) {
    const I& x = i < 16 ? a : i < 32 ? b : i < 48 ? c : d;
    bytes[i] = uint8_t(std::clamp(x.v[i % 16], low, high));
  }
  return load_bytes(bytes);
}
inline void store_bytes(void* p, const B& a) { std::memcpy(p, a.v, sizeof a.v); }
// byte k of each lane, as uint8 or int8
template <bool kUnsigned>
inline int byte_of(uint32_t lane, int k) {
  const uint32_t byte = (lane >> (8 * k)) & 255;
  return kUnsigned ? int(byte) : int(int8_t(byte));
}
// acc + the bytes of each lane
template <bool kUnsigned>
inline I add_bytes(const I& acc, const B& a) {
  return each<I>([&](int i) {
    int total = acc.v[i];
    for (int k = 0; k < 4; ++k) total += byte_of<kUnsigned>(a.v[i], k);
    return total;
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
