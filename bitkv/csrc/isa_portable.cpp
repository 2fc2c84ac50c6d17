// The kernels for any CPU.
#include "isa_headers.h"
#include "simd_portable.h"

#define BITKV_ISA portable
#include "isa.h"

namespace bitkv {
const Kernels kPortable = portable::kernels("portable");
}
