// The kernels for any CPU.
#include "isa_headers.h"

#define BITKV_ISA portable
#include "simd_portable.h"
#include "isa.h"

namespace bitkv {
const Kernels kPortable = portable::kernels("portable");
}
