// Which small_gemm (small_gemm.cuh) a call is: how many tokens a block takes, and which groups the
// compiler knows.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "small_gemm.cuh"

namespace llmq::cuda {

template <class Weight, class X, int kT, int kGroup>
void launch_tiles(const SmallGemm& g, void* stream) {
  using P = Plan<Weight, X, kT, kGroup>;
  const Launch grid{static_cast<unsigned>(ceil_div(g.M, P::kTokens)),
                    static_cast<unsigned>(ceil_div(g.N, kBlockOutputs)),
                    static_cast<unsigned>(g.splits),
                    kThreads,
                    P::kBytes,
                    stream};
  launch(small_gemm<Weight, X, kT, kGroup>, grid, g);
}

// Groups of so many inputs whose scales can be read some at once, or kAnyGroup.
template <class Weight, class X>
int group_of(const SmallGemm& g) {
  constexpr bool kOutputs = !X::kCodes || Weight::kBits == 4;
  const int groups = kOutputs ? g.groups : g.x_groups, group = g.K / groups;
  if (kOutputs && X::kFoldsTokens && g.x_groups != groups) return kAnyGroup;
  if (group != 32 && group != 64 && group != 128) return kAnyGroup;
  const int at_once = std::min(Weight::kChunk / group, 4);
  const auto odd = [&](const void* p, int bytes) {
    return reinterpret_cast<uintptr_t>(p) % static_cast<unsigned>(bytes) != 0;
  };
  if (groups % at_once != 0 || odd(kOutputs ? g.scale : g.x_scale, 4 * at_once)) return kAnyGroup;
  return kOutputs && odd(g.zero_point, at_once) ? kAnyGroup : group;
}

template <class Weight, class X, int kT>
void launch_groups(const SmallGemm& g, void* stream) {
  constexpr bool kCanFold = X::kCodes ? X::kFoldsTokens : Weight::kGroups;
  if constexpr (!X::kFoldsTokens) {
    if (!kCanFold || (g.groups == 1 && g.zero_point == nullptr)) {
      return launch_tiles<Weight, X, kT, kOneScale>(g, stream);
    }
  }
  if constexpr (kCanFold) {
    const int group = group_of<Weight, X>(g);
    if constexpr (Weight::kBits == 4 || X::kCodes) {
      if (group == 64) return launch_tiles<Weight, X, kT, 64>(g, stream);
    }
    if constexpr (Weight::kBits == 4) {
      if (group == 32) return launch_tiles<Weight, X, kT, 32>(g, stream);
      if (group == 128) return launch_tiles<Weight, X, kT, 128>(g, stream);
    }
    launch_tiles<Weight, X, kT, kAnyGroup>(g, stream);
  }
}

template <class Weight, class X>
void launch_small_gemm(const SmallGemm& g, void* stream) {
  switch (block_tokens(g.M)) {
    case 8:
      return launch_groups<Weight, X, 1>(g, stream);
    case 16:
      return launch_groups<Weight, X, 2>(g, stream);
    default:
      return launch_groups<Weight, X, 4>(g, stream);
  }
}

}  // namespace llmq::cuda
