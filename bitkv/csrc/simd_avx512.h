// Sixteen lanes in one register: AVX-512 F, BW, DQ, VL and VNNI.
#pragma once

#include <immintrin.h>

#include "page.h"

namespace bitkv::BITKV_ISA {

constexpr int kAccumulators = 16;  // registers a kernel may use for sums

struct F { __m512 v; };   // float32
struct I { __m512i v; };  // int32
struct B { __m512i v; };  // four bytes a lane

inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F load(const uint16_t* p, DType dtype) {  // f16 or bf16
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if (dtype == DType::f16) return {_mm512_cvtph_ps(x)};
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
inline F load_half(const uint16_t* p) { return load(p, DType::f16); }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x.v); }
inline void store_half(uint16_t* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
inline F set(float x) { return {_mm512_set1_ps(x)}; }
inline F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F abs(F a) { return {_mm512_abs_ps(a.v)}; }
inline F round(F a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// lane by lane: a < b ? x : y
inline F select_less(F a, F b, F x, F y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
inline float sum(F a) { return _mm512_reduce_add_ps(a.v); }
inline float max(F a) { return _mm512_reduce_max_ps(a.v); }
// a * 2^n, n being in the low bits of the float n
inline F times_power_of_two(F a, F n) {
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_slli_epi32(_mm512_castps_si512(n.v), 23)))};
}
inline F round_to_half(F a) {  // to what float16 can hold
  return {_mm512_cvtph_ps(_mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT))};
}
// lane i of x[j] and lane j of x[i] change places
inline void transpose(F (&x)[kLanes]) {
  __m512 y[kLanes];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    y[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(y[i + j]), b = _mm512_castps_pd(y[i + j + 2]);
      x[i + 2 * j].v = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      x[i + 2 * j + 1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  // x[4i + j] holds, in quarter q, rows 4i to 4i + 3 of column 4q + j
  for (int j = 0; j < 4; ++j) {
    const __m512 a = _mm512_shuffle_f32x4(x[j].v, x[4 + j].v, 0x88), b = _mm512_shuffle_f32x4(x[j].v, x[4 + j].v, 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(x[8 + j].v, x[12 + j].v, 0x88), d = _mm512_shuffle_f32x4(x[8 + j].v, x[12 + j].v, 0xdd);
    x[j].v = _mm512_shuffle_f32x4(a, c, 0x88);
    x[4 + j].v = _mm512_shuffle_f32x4(b, d, 0x88);
    x[8 + j].v = _mm512_shuffle_f32x4(a, c, 0xdd);
    x[12 + j].v = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

inline I zero_int() { return {_mm512_setzero_si512()}; }
inline I to_int(F a) { return {_mm512_cvtps_epi32(a.v)}; }  // nearest, ties to even
inline F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I shift_left(I a, int by) { return {_mm512_slli_epi32(a.v, unsigned(by))}; }
inline I load_int(const void* p) { return {_mm512_loadu_si512(p)}; }
inline void store_int(void* p, I a) { _mm512_storeu_si512(p, a.v); }
inline int sum(I a) { return _mm512_reduce_add_epi32(a.v); }
inline void store_bytes(int8_t* p, I a) {  // numbers that fit in a byte
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}

inline B load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
// the lanes shifted right by `by` bits, each byte masked
inline B bits_at(B a, int by, uint8_t mask) {
  return {_mm512_and_si512(_mm512_srli_epi32(a.v, unsigned(by)), _mm512_set1_epi8(char(mask)))};
}
template <int kBits>
inline B shifted(B a) { return {_mm512_srli_epi32(a.v, kBits)}; }
// byte k of each lane as float, for k = 0 ... 3
inline F byte_to_float(B a, int k) {
  return {_mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(a.v, unsigned(8 * k)), _mm512_set1_epi32(255)))};
}

using Products = I;  // sums of products need no room of their own
inline Products start(I acc) { return acc; }
inline I finish(I, Products sums) { return sums; }
// acc + sum over a lane's four bytes of code * number; `four` holds four int8 for all lanes. In assembly,
// because GCC copies and spills the sums around the intrinsic.
inline Products dot(Products acc, B codes, int32_t four) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(codes.v), "v"(_mm512_set1_epi32(four)));
  return acc;
}
// the same with four uint8
inline Products dot_unsigned(Products acc, B codes, int32_t four) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(_mm512_set1_epi32(four)), "v"(codes.v));
  return acc;
}

// sixteen numbers of each of four vectors as bytes, in order
template <bool kUnsigned>
inline B pack(I a, I b, I c, I d) {
  const __m512i ab = _mm512_packs_epi32(a.v, b.v), cd = _mm512_packs_epi32(c.v, d.v);
  const __m512i mixed = kUnsigned ? _mm512_packus_epi16(ab, cd) : _mm512_packs_epi16(ab, cd);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return {_mm512_permutexvar_epi32(order, mixed)};
}
inline void store_bytes(void* p, B a) { _mm512_storeu_si512(p, a.v); }
inline B operator+(B a, B b) { return {_mm512_add_epi8(a.v, b.v)}; }
// acc + the bytes of each lane
template <bool kUnsigned>
inline I add_bytes(I acc, B a) {
  const __m512i ones = _mm512_set1_epi8(1);
  if constexpr (kUnsigned) asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(a.v), "v"(ones));
  else asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(ones), "v"(a.v));
  return acc;
}

// Quads: columns k, 4 + k, 8 + k and 12 + k of sixteen, whose 1-bit codes are neighbours in a byte.
// Their sums, each where each of the four was.
inline F sums_of_quads(F a) {
  const F two = a + F{_mm512_shuffle_f32x4(a.v, a.v, 0xb1)};
  return two + F{_mm512_shuffle_f32x4(two.v, two.v, 0x4e)};
}
// From sixteen numbers the tables of their quads, sixteen bytes each: entry e is the sum of those e has bits for.
inline void choices_of_quads(const int8_t* numbers, uint8_t* tables) {
  const __m512i x = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(numbers)));
  const __m512i quad = _mm512_set_epi32(0x03030303, 0x03030303, 0x03030303, 0x03030303, 0x02020202, 0x02020202,
                                        0x02020202, 0x02020202, 0x01010101, 0x01010101, 0x01010101, 0x01010101,
                                        0, 0, 0, 0);
  const __m512i entry = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  __m512i sum[4];
  for (int p = 0; p < 4; ++p) {
    const __mmask64 chosen = _mm512_test_epi8_mask(entry, _mm512_set1_epi8(char(1 << p)));
    sum[p] = _mm512_maskz_shuffle_epi8(chosen, x, _mm512_add_epi8(quad, _mm512_set1_epi8(char(4 * p))));
  }
  _mm512_storeu_si512(tables, _mm512_add_epi8(_mm512_add_epi8(sum[0], sum[1]), _mm512_add_epi8(sum[2], sum[3])));
}
// where the low nibble of each byte points in four tables, one for each byte of a lane
constexpr bool kHasLookup = true;
inline B entries(B a) {
  const __m512i mask = _mm512_set1_epi8(15), table = _mm512_set1_epi32(0x30201000);
  return {_mm512_ternarylogic_epi32(a.v, mask, table, 0xea)};  // (a & mask) | table
}
inline B lookup(B tables, B index) {  // VBMI, which not every CPU with VNNI has; hence assembly
  B r;
  asm("vpermb %1, %2, %0" : "=v"(r.v) : "v"(tables.v), "v"(index.v));
  return r;
}

// The same from 64 numbers: sums of the choices of pairs first, then those of quads from these.
inline void choices_of_sixteen_quads(const int8_t* numbers, uint8_t* tables) {
  const B x = load_bytes(numbers);
  // byte 4k + c of a quarter: numbers k and 4 + k, or 8 + k and 12 + k, as c has bits for them; 128: neither
  const auto chosen = [&](int32_t first, int32_t second) {
    const __m128i k = _mm_setr_epi32(0, 0x01010101, 0x02020202, 0x03030303);
    const auto index = [&](int32_t from) { return _mm512_broadcast_i32x4(_mm_adds_epu8(k, _mm_set1_epi32(from))); };
    return B{_mm512_shuffle_epi8(x.v, index(first))} + B{_mm512_shuffle_epi8(x.v, index(second))};
  };
  const B pairs = chosen(int32_t(0x00800080), int32_t(0x04048080)), others = chosen(int32_t(0x08800880), int32_t(0x0c0c8080));
  const __m512i quad = _mm512_set_epi32(0x0c0c0c0c, 0x0c0c0c0c, 0x0c0c0c0c, 0x0c0c0c0c, 0x08080808, 0x08080808,
                                        0x08080808, 0x08080808, 0x04040404, 0x04040404, 0x04040404, 0x04040404,
                                        0, 0, 0, 0);
  const __m512i low = _mm512_set1_epi32(0x03020100);
  const __m512i high = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x01010101, 0x02020202, 0x03030303));
  B of_pairs{_mm512_add_epi8(quad, low)}, of_others{_mm512_add_epi8(quad, high)};
  const B quarter{_mm512_set1_epi8(16)};
  for (int g = 0; g < 4; ++g) {
    store_bytes(tables + g * 64, lookup(pairs, of_pairs) + lookup(others, of_others));
    of_pairs = of_pairs + quarter, of_others = of_others + quarter;
  }
}

// The sums, or largest lanes, of four vectors at once.
template <class Op>
inline void reduce(const F (&x)[4], float* out, const Op& op) {
  const F ab = op(F{_mm512_unpacklo_ps(x[0].v, x[1].v)}, F{_mm512_unpackhi_ps(x[0].v, x[1].v)});
  const F cd = op(F{_mm512_unpacklo_ps(x[2].v, x[3].v)}, F{_mm512_unpackhi_ps(x[2].v, x[3].v)});
  const __m512d p = _mm512_castps_pd(ab.v), q = _mm512_castps_pd(cd.v);
  const F abcd = op(F{_mm512_castpd_ps(_mm512_unpacklo_pd(p, q))}, F{_mm512_castpd_ps(_mm512_unpackhi_pd(p, q))});
  const F half = op(abcd, F{_mm512_shuffle_f32x4(abcd.v, abcd.v, 0x4e)});
  const F quarter = op(half, F{_mm512_shuffle_f32x4(half.v, half.v, 0xb1)});
  _mm_storeu_ps(out, _mm512_castps512_ps128(quarter.v));
}
inline void sums(const F (&x)[4], float* out) { reduce(x, out, [](F a, F b) { return a + b; }); }
inline void maxima(const F (&x)[4], float* out) { reduce(x, out, [](F a, F b) { return max(a, b); }); }

}  // namespace bitkv::BITKV_ISA
