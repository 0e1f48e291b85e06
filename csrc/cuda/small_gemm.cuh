// y = x Wᵀ for few tokens: the loop that weight_only and int8 GEMMs share.
//
//     block   4 warps · 16R outputs × 8T tokens × a K-slice; grid (tokens, outputs, slices)
//     warp    its own quarter of the slice, a chunk of 64 inputs at a time:
//             R tiles of weights (2 KB) and T fragments of x, kStages chunks on their way by cp.async
//     lane    copies and reads back its own 16 bytes only, so the loop needs no barrier
//
// The weights are the rows of mma (16) and the tokens its columns (8): one token costs no more than
// eight. Sums of the warps meet in shared memory, sums of the slices in global memory, where the
// last block to arrive adds them in order: the result does not depend on timing. Read bandwidth
// bounds it; what each kernel reaches of it is not yet measured (benchmarks/results/static has bounds).
#pragma once

#include <type_traits>

#include "floats.cuh"
#include "fragments.cuh"
#include "kernels.h"
#include "ptx.cuh"

namespace llmq::cuda {

inline constexpr int kWarps = 4;
inline constexpr int kThreads = 32 * kWarps;
inline constexpr int kTokenTile = 8;

LLMQ_PTX int clamp(int value, int most) { return value < 0 ? 0 : value < most ? value : most; }
LLMQ_PTX int least(int a, int b) { return a < b ? a : b; }

// -- x -----------------------------------------------------------------------------------------------

// Tokens in f16 or bf16, multiplied with weights that were converted to it.
template <class T>
struct Floats {
  using Sum = float;
  using Element = T;
  static constexpr bool kCodes = false, kFoldsTokens = false;
  static constexpr int kLaneBytes = 16;  // of a half chunk

  LLMQ_PTX static void copy(unsigned char* to, const SmallGemm& g, int m, int k) {
    const int bytes = m < g.M ? clamp((g.K - k) * 2, 16) : 0;
    const T* from = static_cast<const T*>(g.x) + (bytes > 0 ? m * g.x_stride + k : 0);
    if (g.x_stride % 8 == 0) {
      ptx::cp_async_16(to, from, bytes);
      return;
    }
    Words4 words{};  // rows that start anywhere: right, slow
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t bits = 2 * i < bytes ? ptx::ld_global(from + i).bits : 0;
      words.word[i / 2] |= bits << (16 * (i % 2));
    }
    ptx::st_shared(reinterpret_cast<Words4*>(to), words);
  }
};

// Tokens as int8 codes; with kGroups each group of inputs has its own scale.
template <bool kGroups>
struct Codes {
  using Sum = int32_t;
  static constexpr bool kCodes = true, kFoldsTokens = kGroups;
  static constexpr int kLaneBytes = 8;

  LLMQ_PTX static void copy(unsigned char* to, const SmallGemm& g, int m, int k) {
    const bool inside = m < g.M && k < g.x_stride;
    const int64_t from = inside ? m * g.x_stride + k : 0;
    ptx::cp_async_8(to, static_cast<const int8_t*>(g.x) + from, inside ? 8 : 0);
  }
};

// -- the kernel --------------------------------------------------------------------------------------

// Which chunks, and so which groups of scales, a block works on.
struct Slice {
  int begin, end;  // chunks
  int group;       // inputs
  int first_group, groups;

  LLMQ_PTX Slice(const SmallGemm& g, int all_groups) {
    const int chunks = (g.K + kTileInputs - 1) / kTileInputs;
    const int z = static_cast<int>(blockIdx.z);
    begin = static_cast<int>(static_cast<int64_t>(chunks) * z / g.splits);
    end = static_cast<int>(static_cast<int64_t>(chunks) * (z + 1) / g.splits);
    group = all_groups == 1 ? chunks * kTileInputs : g.K / all_groups;
    first_group = begin * kTileInputs / group;
    const int last = (least(end * kTileInputs, g.K) - 1) / group;
    groups = end > begin ? last - first_group + 1 : 0;
  }
};

// Shared memory: the scales of the slice, then the stages of each warp, where the sums go at the end.
template <class Weight, class X, int kT>
struct Plan {
  static constexpr int kOutputs = kTileRows * Weight::kTiles, kTokens = kTokenTile * kT;
  static constexpr int kScaleRows = X::kFoldsTokens ? kTokens : X::kCodes ? 0 : kOutputs;
  static constexpr int kScaleBytes = kMaxGroups * kScaleRows * static_cast<int>(sizeof(FloatWord));
  static constexpr int kStages = kT == 4 && !X::kCodes ? 3 : 4;
  static constexpr int kWeightBytes = Weight::kTiles * Weight::kTileBytes;
  static constexpr int kStageBytes = kWeightBytes + kT * 2 * 32 * X::kLaneBytes;
  static constexpr int kSumStride = kOutputs + 4;  // lanes of one store meet different banks
  static constexpr int kBytes = kScaleBytes + kWarps * kStages * kStageBytes;
  static_assert(kTokens * kSumStride * 4 <= kStages * kStageBytes);
};

// Scales of a slice, [groups, rows]: of outputs beside what takes their zero point away, of tokens.
template <class Weight, class X>
LLMQ_PTX void load_scales(const SmallGemm& g, const Slice& slice, int first, int rows,
                          FloatWord* table) {
  for (int i = static_cast<int>(threadIdx.x); i < slice.groups * rows; i += kThreads) {
    const int row = i % rows, group = slice.first_group + i / rows;
    FloatWord entry{0, 0};
    if constexpr (X::kFoldsTokens) {
      if (first + row < g.M) {
        entry.value =
            ptx::ld_global(g.x_scale + static_cast<int64_t>(first + row) * g.x_groups + group);
      }
    } else if constexpr (!X::kCodes) {
      int zero_point = Weight::kBits == 4 ? 8 : 0;
      if (first + row < g.N) {
        const int64_t at = static_cast<int64_t>(first + row) * g.groups + group;
        entry.value = g.scale == nullptr ? 1 : ptx::ld_global(g.scale + at);
        if (g.zero_point != nullptr) zero_point = ptx::ld_global(g.zero_point + at);
      }
      entry.word = zero_word<Weight::kBits>(zero_point, row, typename X::Element{});
    }
    ptx::st_shared(table + i, entry);
  }
}

// Adds what the block's warps, then the slices, have summed; true in the block that has it all,
// where thread i holds outputs i, i + kThreads, … of [8T, 16R].
template <int kOutputs, int kTokens, int kStride, class Sum>
LLMQ_PTX bool reduce(const SmallGemm& g, Sum* shared, Sum (&sums)[kOutputs * kTokens / kThreads]) {
  constexpr int kEach = kOutputs * kTokens / kThreads;
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int item = thread + i * kThreads;
    const int at = item / kOutputs * kStride + item % kOutputs;
    sums[i] = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      sums[i] += ptx::ld_shared(shared + warp * kTokens * kStride + at);
    }
  }
  if (g.splits == 1) return true;

  const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  Sum* const partial =
      reinterpret_cast<Sum*>(g.partial) + block * g.splits * (kOutputs * kTokens) + thread;
  Sum* const mine = partial + static_cast<int64_t>(blockIdx.z) * (kOutputs * kTokens);
#pragma unroll
  for (int i = 0; i < kEach; ++i) ptx::st_global(mine + i * kThreads, sums[i]);
  ptx::fence();    // each thread's sums are seen by all before
  ptx::barrier();  // one of them says that the block has arrived
  auto* const arrived = reinterpret_cast<uint32_t*>(shared);
  if (thread == 0) {
    ptx::st_shared(arrived, ptx::atom_inc(g.arrivals + block, static_cast<uint32_t>(g.splits - 1)));
  }
  ptx::barrier();
  if (ptx::ld_shared(arrived) != static_cast<uint32_t>(g.splits - 1)) return false;
  ptx::fence();
#pragma unroll
  for (int i = 0; i < kEach; ++i) sums[i] = 0;
  for (int z = 0; z < g.splits; ++z) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      sums[i] += ptx::ld_global_cg(partial + z * (kOutputs * kTokens) + i * kThreads);
    }
  }
  return true;
}

// `Weight` says how R tiles of a chunk come to shared memory and from there to A fragments.
template <class Weight, class X, int kT>
__global__ void __launch_bounds__(kThreads) small_gemm(const SmallGemm g) {
  using Sum = typename X::Sum;
  using P = Plan<Weight, X, kT>;
  constexpr int kR = Weight::kTiles, kOutputs = P::kOutputs, kTokens = P::kTokens;
  constexpr int kStages = P::kStages, kScaleRows = P::kScaleRows;
  constexpr bool kFolds = !X::kCodes || X::kFoldsTokens;
  using Total = std::conditional_t<kFolds, float, int32_t>;

  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int n0 = static_cast<int>(blockIdx.y) * kOutputs;
  const int m0 = static_cast<int>(blockIdx.x) * kTokens;
  const Slice slice(g, X::kFoldsTokens ? g.x_groups : g.groups);

  auto* const table = reinterpret_cast<FloatWord*>(ptx::shared_memory());
  unsigned char* const stage0 = ptx::shared_memory() + P::kScaleBytes;
  Weight weight(g, n0 / kTileRows);
  unsigned char* const own_stages = stage0 + warp * kStages * P::kStageBytes;

  const int count = slice.end - slice.begin;
  const int begin = slice.begin + count * warp / kWarps;
  const int end = slice.begin + count * (warp + 1) / kWarps;

  const auto copy = [&](int chunk) {
    if (chunk < end) {
      unsigned char* stage = own_stages + (chunk - begin) % kStages * P::kStageBytes;
      weight.copy(stage, chunk, lane);
      stage += P::kWeightBytes;
#pragma unroll
      for (int i = 0; i < 2 * kT; ++i) {
        X::copy(stage + (i * 32 + lane) * X::kLaneBytes, g, m0 + i / 2 * kTokenTile + lane / 4,
                chunk * kTileInputs + i % 2 * 32 + lane % 4 * 8);
      }
    }
    ptx::cp_async_commit();  // also when empty: waits count groups
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) copy(begin + i);
  if constexpr (kFolds) {
    load_scales<Weight, X>(g, slice, X::kFoldsTokens ? m0 : n0, kScaleRows, table);
    ptx::barrier();
  }

  Sum sums[kR][kT][4] = {};
  Total totals[kR][kT][4] = {};
  int group = begin * kTileInputs / slice.group - slice.first_group;
  int in_group = begin * kTileInputs % slice.group;
  uint32_t zero[kR][2] = {};

  const auto enter_group = [&] {
    if constexpr (!X::kCodes) {
#pragma unroll
      for (int i = 0; i < 2 * kR; ++i) {
        zero[i / 2][i % 2] = ptx::ld_shared(&table[group * kScaleRows + i * 8 + lane / 4].word);
      }
    }
  };
  // Sums of a group, times its scale, go to the totals.
  const auto fold = [&] {
    if constexpr (kFolds) {
#pragma unroll
      for (int r = 0; r < kR; ++r) {
#pragma unroll
        for (int t = 0; t < kT; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = X::kFoldsTokens ? t * kTokenTile + lane % 4 * 2 + i % 2
                                            : r * kTileRows + i / 2 * 8 + lane / 4;
            const float scale = ptx::ld_shared(&table[group * kScaleRows + row].value);
            totals[r][t][i] += static_cast<float>(sums[r][t][i]) * scale;
            sums[r][t][i] = 0;
          }
        }
      }
    }
  };

  if (begin < end) enter_group();
  for (int chunk = begin; chunk < end; ++chunk) {
    ptx::cp_async_wait<kStages - 2>();
    const unsigned char* const stage = own_stages + (chunk - begin) % kStages * P::kStageBytes;
    const unsigned char* const x_stage = stage + P::kWeightBytes;
    typename Weight::Words words[kR];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t b[kT][X::kLaneBytes / 8][2];
#pragma unroll
      for (int t = 0; t < kT; ++t) {
        const unsigned char* from = x_stage + ((2 * t + half) * 32 + lane) * X::kLaneBytes;
        if constexpr (X::kCodes) {
          const Words2 w = ptx::ld_shared(reinterpret_cast<const Words2*>(from));
          b[t][0][0] = w.word[0], b[t][0][1] = w.word[1];
        } else {
          const Words4 w = ptx::ld_shared(reinterpret_cast<const Words4*>(from));
          b[t][0][0] = w.word[0], b[t][0][1] = w.word[1];
          b[t][1][0] = w.word[2], b[t][1][1] = w.word[3];
        }
      }
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        weight.load(words[r], stage, r, half, lane);
#pragma unroll
        for (int step = 0; step < X::kLaneBytes / 8; ++step) {
          uint32_t a[4];
          if constexpr (X::kCodes) {
            Weight::codes(words[r], a);
          } else {
            Weight::floats(words[r], half, step, zero[r][0], zero[r][1], a, typename X::Element{});
          }
#pragma unroll
          for (int t = 0; t < kT; ++t) {
            if constexpr (X::kCodes) {
              ptx::mma(sums[r][t], a, b[t][step], int8_t{});
            } else {
              ptx::mma(sums[r][t], a, b[t][step], typename X::Element{});
            }
          }
        }
      }
      if constexpr (kFolds) {
        in_group += 32;
        if (in_group == slice.group) {
          fold();
          in_group = 0;
          if (chunk * kTileInputs + half * 32 + 32 < least(end * kTileInputs, g.K)) {
            ++group;
            enter_group();
          }
        }
      }
    }
    copy(chunk + kStages - 1);
  }
  if (begin < end && in_group > 0) fold();
  ptx::cp_async_wait<0>();
  ptx::barrier();  // the stages have been read: their memory takes the sums

  auto* const shared = reinterpret_cast<Total*>(stage0);
#pragma unroll
  for (int r = 0; r < kR; ++r) {
#pragma unroll
    for (int t = 0; t < kT; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = t * kTokenTile + lane % 4 * 2 + i % 2;
        const int output = r * kTileRows + i / 2 * 8 + lane / 4;
        Total value;
        if constexpr (kFolds) {
          value = totals[r][t][i];
        } else {
          value = sums[r][t][i];
        }
        ptx::st_shared(shared + (warp * kTokens + token) * P::kSumStride + output, value);
      }
    }
  }
  ptx::barrier();
  constexpr int kEach = kOutputs * kTokens / kThreads;
  Total all[kEach];
  if (!reduce<kOutputs, kTokens, P::kSumStride>(g, shared, all)) return;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int item = static_cast<int>(threadIdx.x) + i * kThreads;
    const int m = m0 + item / kOutputs, n = n0 + item % kOutputs;
    if (m >= g.M || n >= g.N) continue;
    float y = static_cast<float>(all[i]);
    if constexpr (X::kCodes) {
      if constexpr (!X::kFoldsTokens) y = ptx::mul(y, ptx::ld_global(g.x_scale + m));
      y = ptx::mul(y, ptx::ld_global(g.scale + n));
    }
    if (g.bias != nullptr) y = ptx::add(y, load_float(g.bias, g.bias_dtype, n));
    store_float(g.y, g.y_dtype, static_cast<int64_t>(m) * g.N + n, y);
  }
}

// -- launch ------------------------------------------------------------------------------------------

template <class Weight, class X, int kT>
void launch_tiles(const SmallGemm& g, void* stream) {
  using P = Plan<Weight, X, kT>;
  static_assert(P::kOutputs == cut(Weight::kWeights, 0, 0).outputs);
  const Launch grid{static_cast<unsigned>(ceil_div(g.M, P::kTokens)),
                    static_cast<unsigned>(ceil_div(g.N, P::kOutputs)),
                    static_cast<unsigned>(g.splits),
                    kThreads,
                    P::kBytes,
                    stream};
  launch(small_gemm<Weight, X, kT>, grid, g);
}

template <class Weight, class X>
void launch_small_gemm(const SmallGemm& g, void* stream) {
  switch (cut(Weight::kWeights, g.M, g.N).tokens) {
    case 8:
      return launch_tiles<Weight, X, 1>(g, stream);
    case 16:
      return launch_tiles<Weight, X, 2>(g, stream);
    default:
      return launch_tiles<Weight, X, 4>(g, stream);
  }
}

}  // namespace llmq::cuda
