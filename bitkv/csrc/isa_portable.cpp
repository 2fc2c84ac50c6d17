// The kernels for any CPU.
#include "isa_headers.h"
#include "simd_portable.h"

#define BITKV_ISA portable
#include "attend.h"
#include "quantize.h"
#include "nearest.h"

namespace bitkv {
const Kernels kPortable{.name = "portable",
                    .lookups = false,
                    .matrix = false,
                    .attend = portable::attend,
                    .encode = portable::encode,
                    .nearest = portable::nearest,
                    .encode_codes = portable::encode_codes,
                    .tabulate = nullptr};
}
