// The kernels for CPUs with AVX2; compiled with its flags.
#include "isa_headers.h"

#define BITKV_ISA avx2
#include "simd_avx2.h"
#include "isa.h"

namespace bitkv {
const Kernels kAvx2 = avx2::kernels("avx2");
}
