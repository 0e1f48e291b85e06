#include "dispatch.h"

namespace llmq {

// The one table family × instruction set: a row a family, a column an Isa. To add a family: its
// struct and functions in kernels.h, its accessor in dispatch.h, its row here.
#if defined(__x86_64__)
#define LLMQ_FAMILY(fn, family)                                                     \
  fn* family() {                                                                    \
    static constexpr fn* kRow[] = {family##_portable, family##_avx2, family##_avx512vnni}; \
    return kRow[static_cast<int>(current_isa())];                                   \
  }
#else
#define LLMQ_FAMILY(fn, family) \
  fn* family() { return family##_portable; }
#endif

LLMQ_FAMILY(ConvertRowsFn, to_float)
LLMQ_FAMILY(ConvertRowsFn, from_float)
LLMQ_FAMILY(QuantizeRowsFn, quantize_rows)
LLMQ_FAMILY(Int8GemmFn, int8_gemm)

}  // namespace llmq
