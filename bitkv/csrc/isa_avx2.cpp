// The kernels for CPUs with AVX2; compiled with its flags.
#include "isa_headers.h"
#include "simd_avx2.h"

#define BITKV_ISA avx2
#include "attend.h"
#include "quantize.h"
#include "nearest.h"

namespace bitkv {
const Kernels kAvx2{"avx2", false, avx2::attend, avx2::encode, avx2::nearest, avx2::encode_codes, nullptr};
}
