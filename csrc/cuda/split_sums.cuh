// Adds up what the blocks that share outputs, a slice of K each, have summed.
//
// Each writes its sums to global memory and says that it has arrived; the last adds all of them in
// the order of the slices, so that the result does not depend on timing.
#pragma once

#include "block_plan.cuh"
#include "kernels.h"
#include "ptx.cuh"

namespace llmq::cuda {

// Adds what the slices have summed; true in the block that has it all. Threads keep to their own
// sums, of which wanted(i) says whether number i belongs to a token and an output.
template <int kCount, class Sum, class Wanted>
LLMQ_PTX bool reduce(const SmallGemm& g, Sum (&sums)[kCount], const Wanted& wanted) {
  if (g.splits == 1) return true;
  const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  Sum* const partial =
      reinterpret_cast<Sum*>(g.partial) + block * g.splits * (kCount * kThreads) + threadIdx.x;
  Sum* const mine = partial + static_cast<int64_t>(blockIdx.z) * (kCount * kThreads);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (wanted(i)) ptx::st_global(mine + i * kThreads, sums[i]);
  }
  ptx::fence();    // each thread's sums are seen by all before
  ptx::barrier();  // one of them says that the block has arrived
  auto* const arrived = reinterpret_cast<uint32_t*>(ptx::shared_memory());
  if (threadIdx.x == 0) {
    ptx::st_shared(arrived, ptx::atom_inc(g.arrivals + block, static_cast<uint32_t>(g.splits - 1)));
  }
  ptx::barrier();
  if (ptx::ld_shared(arrived) != static_cast<uint32_t>(g.splits - 1)) return false;
  ptx::fence();
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[i] = 0;
  for (int z = 0; z < g.splits; ++z) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (wanted(i)) sums[i] += ptx::ld_global_cg(partial + z * (kCount * kThreads) + i * kThreads);
    }
  }
  return true;
}

}  // namespace llmq::cuda
