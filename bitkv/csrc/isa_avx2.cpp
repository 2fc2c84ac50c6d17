// The kernels for CPUs with AVX2; compiled with its flags.
#include "isa_headers.h"
#include "simd_avx2.h"

#define BITKV_ISA avx2
#include "attend.h"
#include "quantize.h"
#include "nearest.h"

namespace bitkv {
const Kernels kAvx2{.name = "avx2",
                    .lookups = false,
                    .matrix = false,
                    .attend = avx2::attend,
                    .encode = avx2::encode,
                    .nearest = avx2::nearest,
                    .encode_codes = avx2::encode_codes,
                    .tabulate = nullptr};
}
