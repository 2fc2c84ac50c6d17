// The kernels for CPUs with AVX-512; compiled with its flags.
#include "isa_headers.h"
#include "simd_avx512.h"

#define BITKV_ISA avx512
#define BITKV_LOOKUP  // of bytes in tables of 256
#include "attend.h"
#include "quantize.h"
#include "nearest.h"

namespace bitkv {
namespace {

constexpr Kernels kernels(const char* name, bool lookups, bool matrix) {
  return {.name = name,
          .lookups = lookups,
          .matrix = matrix,
          .attend = avx512::attend,
          .encode = avx512::encode,
          .nearest = avx512::nearest,
          .encode_codes = avx512::encode_codes,
          .tabulate = lookups ? avx512::tabulate : nullptr};
}

}  // namespace

const Kernels kAvx512Vnni = kernels("avx512vnni", false, false);
const Kernels kAvx512 = kernels("avx512", true, false);  // with VBMI
const Kernels kAmx = kernels("amx", true, true);
}
