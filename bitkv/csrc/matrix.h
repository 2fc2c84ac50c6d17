// The matrix unit of Intel's server CPUs (AMX): registers of up to 16 rows of 64 bytes, and sums of products of two
// of them. Bytes looked up are one operand, and 16 query rows take as long as one. The second operand has in each
// 32-bit word four bytes that meet four neighbours in a row of the first.
//
// In assembly, so that numbers of registers may be constants of templates; used where BITKV_MATRIX is defined (isa_amx.cpp).
// No include guard: attend.h includes this once.

namespace bitkv::BITKV_ISA {

#if defined(BITKV_MATRIX)
constexpr bool kHasMatrix = true;
#else
constexpr bool kHasMatrix = false;
#endif
constexpr int kMatrixRows = 16;   // of a register
constexpr int kMatrixBytes = 64;  // of a row
constexpr int kMatrixLeast = 5;   // query rows from which on keys before the rotary embedding are faster by it

// The unit's registers, by what they hold of keys, and of values:
//   0 ... 3  scores   int32 [query rows][16 tokens] of 64 tokens     sums     int32 [16 channels][columns]
//   4        queries  bytes [query rows][64 channels]
//   5        keys     bytes [16 quads of channels][16 tokens]        entries  bytes [16 channels][64 tokens]
//   6                                                                weights  bytes [16 quads of tokens][columns]
class Matrix {
 public:
  // Threads are others' too: how they had shaped the registers is put back.
  void begin() { asm volatile("sttilecfg %0" : "=m"(before_)); rows_ = columns_ = 0; }
  void end() {
    if (before_.palette) asm volatile("ldtilecfg %0" ::"m"(before_));
    else asm volatile("tilerelease");
  }

  // For keys of so many query rows; what the registers held is lost.
  void shape_keys(int rows) {
    if (rows_ == rows) return;
    rows_ = rows, columns_ = 0;
    Shape to;
    for (int r = 0; r < 5; ++r) to.set(r, rows, kMatrixBytes);
    to.set(5, kMatrixRows, kMatrixBytes);
    asm volatile("ldtilecfg %0" ::"m"(to));
  }

  // For values that so many columns of weights meet.
  void shape_values(int columns) {
    if (columns_ == columns) return;
    rows_ = 0, columns_ = columns;
    Shape to;
    for (int r = 0; r < 7; ++r) to.set(r, kMatrixRows, r == 5 ? kMatrixBytes : 4 * columns);
    asm volatile("ldtilecfg %0" ::"m"(to));
  }

  template <int R>
  static void zero() { asm volatile("tilezero %%tmm%c0" ::"i"(R)); }
  template <int R>
  static void load(const void* p, size_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(R) : "memory");
  }
  template <int R>
  static void store(void* p, size_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(R) : "memory");
  }
  // sums += signed bytes . unsigned bytes
  template <int kSums, int kSigned, int kUnsigned>
  static void dot() { asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kSigned), "i"(kUnsigned)); }

 private:
  struct alignas(64) Shape {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};  // of a row of each register
    uint8_t rows[16] = {};

    void set(int r, int rows_of, int bytes_of) { rows[r] = uint8_t(rows_of), bytes[r] = uint16_t(bytes_of); }
  };

  Shape before_;
  int rows_ = 0, columns_ = 0;
};

}  // namespace bitkv::BITKV_ISA
