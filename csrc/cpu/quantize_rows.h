// The rows and groups of quantize_rows, around what an instruction set does to one group. Internal
// linkage: each file that includes this is compiled with flags of its own (see kernels.h).
#pragma once

#include "kernels.h"

namespace llmq {
namespace {

// The bits of |x| order finite values, infinity, NaN.
constexpr uint32_t kInfinity = 0x7f800000;

// largest_magnitude(x, count): the bits of max|x|. encode(x, count, inverse, codes, null) writes
// the codes and returns their sum; encode_given(…, largest) clamps them and tells the bits of
// max|x|; clear(codes, count) writes zeros.
template <class Element, auto largest_magnitude, auto encode, auto encode_given, auto clear>
void quantize_groups(const QuantizeRows& q) {
  const int64_t groups = q.K == 0 ? 1 : q.K / q.group_size;
  for (int64_t m = 0; m < q.rows; ++m) {
    const Element* x = static_cast<const Element*>(q.x) + m * q.x_stride;
    int8_t* codes = q.codes + m * q.codes_stride;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t k = g * q.group_size;
      if (q.given != nullptr) {
        const float given = *q.given;
        uint32_t largest = kInfinity;
        int32_t sum = 0;
        if (given > 1e-30f && __builtin_bit_cast(uint32_t, given) < kInfinity) {
          sum = encode_given(x + k, q.group_size, 1.0f / given, codes + k, &largest);
        }
        if (largest >= kInfinity) [[unlikely]] {
          clear(codes + k, q.group_size);
          sum = 0;
        }
        q.scale[m * groups + g] = largest < kInfinity ? given : __builtin_nanf("");
        if (q.offset != nullptr) q.offset[m * groups + g] = -128 * sum;
        continue;
      }
      const uint32_t largest = largest_magnitude(x + k, q.group_size);
      const float amax = __builtin_bit_cast(float, largest);
      const bool finite = largest < kInfinity;
      int32_t sum = 0;
      if (finite && amax > 1e-30f) {
        sum = encode(x + k, q.group_size, 127.0f / amax, codes + k, nullptr);
      } else {
        clear(codes + k, q.group_size);
      }
      q.scale[m * groups + g] = finite ? amax / 127.0f : __builtin_nanf("");
      if (q.offset != nullptr) q.offset[m * groups + g] = -128 * sum;
    }
    clear(codes + q.K, q.codes_columns - q.K);
  }
}

}  // namespace
}  // namespace llmq
