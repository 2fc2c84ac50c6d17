// The kernels for CPUs with AVX-512; compiled with its flags.
#include "isa_headers.h"
#include "simd_avx512.h"

#define BITKV_ISA avx512
#include "attend.h"
#include "quantize.h"

namespace bitkv {
const Kernels kAvx512{"avx512", true, avx512::attend, avx512::encode};
const Kernels kAvx512Vnni{"avx512vnni", false, avx512::attend, avx512::encode};  // CPUs without VBMI
}
