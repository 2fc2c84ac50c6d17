// All kernels for one instruction set, whose namespace and vectors the file that includes this has chosen.
//
// No include guard: each isa_*.cpp includes this once, after its simd header.

#include "attend.h"
#include "quantize.h"
#include "nearest.h"

namespace bitkv::BITKV_ISA {

// Under a name; with lookups for CPUs that can do them beside the instruction set.
constexpr Kernels kernels(const char* name, [[maybe_unused]] bool lookups = false) {
  return {.name = name,
          .lookups = lookups,
          .attend = attend,
          .encode = encode,
          .nearest = nearest,
          .encode_codes = encode_codes,
#if defined(BITKV_LOOKUP)
          .tabulate = lookups ? tabulate : nullptr};
#else
          .tabulate = nullptr};
#endif
}

}  // namespace bitkv::BITKV_ISA
