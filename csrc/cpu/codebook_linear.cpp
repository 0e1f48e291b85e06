#include "driver.h"

namespace llmq {

Tensor codebook_linear(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                       const OptionalTensor&, int64_t) {
  fail("codebook_linear", "not built");
}

}  // namespace llmq
