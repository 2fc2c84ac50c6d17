// Sixteen lanes in two registers: AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "page.h"

namespace bitkv::BITKV_ISA {

constexpr int kAccumulators = 4;

struct F { __m256 a, b; };
struct I { __m256i a, b; };
struct B { __m256i a, b; };

inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F load(const uint16_t* p, DType dtype) {
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8));
  if (dtype == DType::f16) return {_mm256_cvtph_ps(a), _mm256_cvtph_ps(b)};
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(b), 16))};
}
inline F load_half(const uint16_t* p) { return load(p, DType::f16); }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
inline void store_half(uint16_t* p, F x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
inline F set(float x) { const __m256 v = _mm256_set1_ps(x); return {v, v}; }
inline F operator+(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F operator-(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F operator*(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F operator/(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F abs(F x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline F round(F x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
inline F select_less(F p, F q, F x, F y) {
  return {_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(p.a, q.a, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(p.b, q.b, _CMP_LT_OQ))};
}
inline float sum(F x) {
  const __m256 s = _mm256_add_ps(x.a, x.b);
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_shuffle_ps(t, t, 1)));
}
inline float max(F x) {
  const __m256 s = _mm256_max_ps(x.a, x.b);
  __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_max_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_max_ss(t, _mm_shuffle_ps(t, t, 1)));
}
// a * 2^n, n being in the low bits of the float n
inline __m256 times_power_of_two(__m256 a, __m256 n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), exponent));
}
inline F times_power_of_two(F a, F n) { return {times_power_of_two(a.a, n.a), times_power_of_two(a.b, n.b)}; }
inline F round_to_half(F x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT;
  return {_mm256_cvtph_ps(_mm256_cvtps_ph(x.a, mode)), _mm256_cvtph_ps(_mm256_cvtps_ph(x.b, mode))};
}
inline void transpose(__m256 (&x)[8]) {
  __m256 y[8];
  for (int i = 0; i < 8; i += 2) {
    y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0x44);
      x[i + 2 * j + 1] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0xee);
    }
  }
  for (int j = 0; j < 4; ++j) {
    const __m256 a = x[j], b = x[4 + j];
    x[j] = _mm256_permute2f128_ps(a, b, 0x20);
    x[4 + j] = _mm256_permute2f128_ps(a, b, 0x31);
  }
}
inline void transpose(F (&x)[kLanes]) {
  __m256 a[8], b[8], c[8], d[8];
  for (int i = 0; i < 8; ++i) a[i] = x[i].a, b[i] = x[i].b, c[i] = x[8 + i].a, d[i] = x[8 + i].b;
  transpose(a), transpose(b), transpose(c), transpose(d);
  for (int i = 0; i < 8; ++i) x[i] = {a[i], c[i]}, x[8 + i] = {b[i], d[i]};
}

inline I zero_int() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I to_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I operator+(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I shift_left(I x, int by) { return {_mm256_slli_epi32(x.a, by), _mm256_slli_epi32(x.b, by)}; }
inline I load_int(const void* p) {
  const __m256i* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline void store_int(void* p, I x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(static_cast<__m256i*>(p) + 1, x.b);
}
inline int sum(I x) {
  const __m256i s = _mm256_add_epi32(x.a, x.b);
  __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}
inline void store_bytes(int8_t* p, I x) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

inline B load_bytes(const void* p) {
  const __m256i* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline B bits_at(B x, int by, uint8_t mask) {
  const __m256i m = _mm256_set1_epi8(char(mask));
  return {_mm256_and_si256(_mm256_srli_epi32(x.a, by), m), _mm256_and_si256(_mm256_srli_epi32(x.b, by), m)};
}
template <int kBits>
inline B shifted(B x) { return {_mm256_srli_epi32(x.a, kBits), _mm256_srli_epi32(x.b, kBits)}; }
inline F byte_to_float(B x, int k) {
  const __m256i m = _mm256_set1_epi32(255);
  return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(x.a, 8 * k), m)),
          _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(x.b, 8 * k), m))};
}

using Products = I;  // sums of products need no room of their own
inline Products start(I acc) { return acc; }
inline I finish(I, Products sums) { return sums; }
// pairs of products are summed in 16 bits, which codes below 16 cannot overflow
inline Products dot(Products acc, B codes, int32_t four) {
  const __m256i numbers = _mm256_set1_epi32(four), ones = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(_mm256_maddubs_epi16(codes.a, numbers), ones)),
          _mm256_add_epi32(acc.b, _mm256_madd_epi16(_mm256_maddubs_epi16(codes.b, numbers), ones))};
}

inline Products dot_unsigned(Products acc, B codes, int32_t four) {
  const __m256i numbers = _mm256_set1_epi32(four), ones = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(_mm256_maddubs_epi16(numbers, codes.a), ones)),
          _mm256_add_epi32(acc.b, _mm256_madd_epi16(_mm256_maddubs_epi16(numbers, codes.b), ones))};
}
// sixteen numbers of each of four vectors as bytes, in order
template <bool kUnsigned>
inline B pack(I x, I y, I z, I w) {
  const auto bytes = [](I p, I q) {
    const __m256i words_p = _mm256_packs_epi32(p.a, p.b), words_q = _mm256_packs_epi32(q.a, q.b);
    const __m256i mixed = kUnsigned ? _mm256_packus_epi16(words_p, words_q) : _mm256_packs_epi16(words_p, words_q);
    return _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7));
  };
  // of eight lanes at a time: p.a's first four, p.b's first four, q.a's ..., then their last four
  const auto ordered = [](__m256i v) {
    return _mm256_shuffle_epi8(v, _mm256_setr_epi8(0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15,
                                                   0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15));
  };
  return {ordered(bytes(x, y)), ordered(bytes(z, w))};
}
inline void store_bytes(void* p, B x) {
  __m256i* q = static_cast<__m256i*>(p);
  _mm256_storeu_si256(q, x.a), _mm256_storeu_si256(q + 1, x.b);
}
// acc + the bytes of each lane
template <bool kUnsigned>
inline I add_bytes(I acc, B x) {
  const __m256i ones = _mm256_set1_epi8(1), words = _mm256_set1_epi16(1);
  const auto four = [&](__m256i v) {
    return _mm256_madd_epi16(kUnsigned ? _mm256_maddubs_epi16(v, ones) : _mm256_maddubs_epi16(ones, v), words);
  };
  return {_mm256_add_epi32(acc.a, four(x.a)), _mm256_add_epi32(acc.b, four(x.b))};
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
