// The scales and zero points of small_gemm.cuh's groups, from memory to registers a chunk ahead.
#pragma once

#include <type_traits>

#include "block_plan.cuh"
#include "ptx.cuh"

namespace llmq::cuda {

// The scales of a chunk's groups, of one row (an output or a token) a lane. They come through
// registers, a chunk ahead of their use, since a zero point is converted on the way.
template <int kGroup, int kFolds, int kBits>
class GroupRow {
  static constexpr int kVector = kGroup == kAnyGroup ? 1 : kFolds < 4 ? kFolds : 4;
  using Scales =
      std::conditional_t<kVector == 4, Words4, std::conditional_t<kVector == 2, Words2, uint32_t>>;
  using Zeros = std::conditional_t<kVector == 4, uint32_t,
                                   std::conditional_t<kVector == 2, uint16_t, uint8_t>>;

  int first, groups, folds;  // of the row; of a group
  int group = 0, fold = 0;   // of kAnyGroup: where the next chunk begins
  Scales scales[kFolds / kVector];
  Zeros zeros[kFolds / kVector];

 public:
  LLMQ_PTX GroupRow(int row, int groups_, int K, int chunk)
      : first(row * groups_), groups(groups_) {
    if constexpr (kGroup == kAnyGroup) {
      folds = groups == 1 ? 1 << 30 : K / groups / 32;
      group = chunk * kFolds / folds;
      fold = chunk * kFolds % folds;
    }
  }

  // Of scales [rows, groups] and, or null, zero points; chunks in order.
  LLMQ_PTX void fetch(const float* scale, const int8_t* zero_point, int chunk) {
#pragma unroll
    for (int i = 0; i < kFolds / kVector; ++i) {
      const int at = kGroup == kAnyGroup ? group : chunk * kFolds + i * kVector;
      scales[i] = Scales{};
      zeros[i] = static_cast<Zeros>(kBits == 4 ? 0x08080808u : 0u);
      if (kGroup == kAnyGroup || at < groups) {
        scales[i] = ptx::ld_global(reinterpret_cast<const Scales*>(scale + first + at));
        if (zero_point != nullptr) {
          zeros[i] = ptx::ld_global(reinterpret_cast<const Zeros*>(zero_point + first + at));
        }
      }
      if (kGroup == kAnyGroup && ++fold == folds) fold = 0, group = ptx::min(group + 1, groups - 1);
    }
  }

  // What fetch has brought: store(fold of the chunk, scale, zero point).
  template <class Store>
  LLMQ_PTX void unpack(const Store& store) const {
#pragma unroll
    for (int i = 0; i < kFolds; ++i) {
      uint32_t bits;
      if constexpr (kVector == 1) {
        bits = scales[i];
      } else {
        bits = scales[i / kVector].word[i % kVector];
      }
      store(i, ptx::float_of(bits), static_cast<int8_t>(zeros[i / kVector] >> (i % kVector * 8)));
    }
  }
};

template <int kGroup, int kBits>
class GroupRow<kGroup, 0, kBits> {  // of which nothing is folded
 public:
  LLMQ_PTX GroupRow(int, int, int, int) {}
  LLMQ_PTX void fetch(const float*, const int8_t*, int) {}
  template <class Store>
  LLMQ_PTX void unpack(const Store&) const {}
};

}  // namespace llmq::cuda
