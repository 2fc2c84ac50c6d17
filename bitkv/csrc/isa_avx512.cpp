// The kernels for CPUs with AVX-512; compiled with its flags.
#include "isa_headers.h"

#define BITKV_ISA avx512
#define BITKV_LOOKUP  // of bytes in tables of 256
#include "simd_avx512.h"
#include "isa.h"

namespace bitkv {
const Kernels kAvx512Vnni = avx512::kernels("avx512vnni");
const Kernels kAvx512 = avx512::kernels("avx512", true);  // with VBMI
}
