// The kernels for any CPU.
#include "isa_headers.h"
#include "simd_portable.h"

#define BITKV_ISA portable
#include "attend.h"
#include "quantize.h"
#include "nearest.h"

namespace bitkv {
const Kernels kPortable{"portable", false, portable::attend, portable::encode, portable::nearest, portable::encode_codes, nullptr};
}
