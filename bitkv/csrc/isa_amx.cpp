// The kernels for CPUs with AVX-512, VBMI and the matrix unit AMX, which are Intel's; compiled with their flags.
#include "isa_headers.h"

#define BITKV_ISA amx
#define BITKV_LOOKUP
#define BITKV_MATRIX  // lookups as Intel's CPUs do them best, and sums by the matrix unit
#include "simd_avx512.h"
#include "isa.h"

namespace bitkv {
const Kernels kAmx = amx::kernels("amx", true);
}
