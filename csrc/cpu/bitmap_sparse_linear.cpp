#include "driver.h"

namespace llmq {

Tensor bitmap_sparse_linear(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                            const OptionalTensor&, const OptionalTensor&,
                            std::optional<int64_t>) {
  fail("bitmap_sparse_linear", "not built");
}

}  // namespace llmq
