// The kernels for CPUs with AVX-512; compiled with its flags.
#include "isa_headers.h"
#include "simd_avx512.h"

#define BITKV_ISA avx512
#include "attend.h"
#include "quantize.h"
#include "nearest.h"

namespace bitkv {
const Kernels kAvx512{"avx512", true, avx512::attend, avx512::encode, avx512::nearest, avx512::encode_codes};
const Kernels kAvx512Vnni{  // CPUs without VBMI
    "avx512vnni", false, avx512::attend, avx512::encode, avx512::nearest, avx512::encode_codes};
}
