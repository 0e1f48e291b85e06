#include "driver.h"

namespace llmq {

Tensors3 pack_bitmap_panels(const Tensor&, const Tensor&, const Tensor&, int64_t) {
  fail("pack_bitmap_panels", "not built");
}

Tensors3 unpack_bitmap_panels(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t) {
  fail("unpack_bitmap_panels", "not built");
}

}  // namespace llmq
