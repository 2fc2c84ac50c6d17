// The kernels for CPUs with AVX-512; compiled with its flags.
#include "isa_headers.h"
#include "simd_avx512.h"

#define BITKV_ISA avx512
#define BITKV_LOOKUP  // of bytes in tables of 256
#include "attend.h"
#include "quantize.h"
#include "nearest.h"

namespace bitkv {
const Kernels kAvx512{"avx512",        true,           avx512::attend,       avx512::encode,
                      avx512::nearest, avx512::encode_codes, avx512::tabulate};
const Kernels kAvx512Vnni{"avx512vnni",    false,          avx512::attend, avx512::encode,  // CPUs without VBMI
                          avx512::nearest, avx512::encode_codes, nullptr};
}
