#include "driver.h"

namespace llmq {

Tensor weight_only_linear(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                          const OptionalTensor&, int64_t, std::optional<int64_t>) {
  fail("weight_only_linear", "not built");
}

}  // namespace llmq
