// y = x Wᵀ for few tokens: the loop that weight_only, int8 and bitmap-sparse GEMMs share.
//
//     block   4 warps · 128 outputs × 8T tokens × a K-slice; grid (tokens, outputs, slices)
//     warp    32 of the outputs, 2 tiles of mma; all warps share the tokens
//     chunk   128 bytes of each row of weights (16 KB) and its inputs of each token, kStages of
//             them on their way by cp.async; one barrier a chunk
//
// The weights are the rows of mma (16) and the tokens its columns (8): one token costs no more than
// eight. Each lane keeps its sums in registers to the end; those of the slices meet in global
// memory (split_sums.cuh). Where a group's scale enters is known to the compiler (kGroup), which
// leaves nothing to ask in the loop. Read bandwidth bounds it; what it reaches is not yet measured.
// What instructions, shared memory and bytes on their way allow is in
// benchmarks/results/static/cuda.json.
#pragma once

#include <type_traits>

#include "block_plan.cuh"
#include "floats.cuh"
#include "fragments.cuh"
#include "group_scales.cuh"
#include "kernels.h"
#include "ptx.cuh"
#include "split_sums.cuh"
#include "token_tiles.cuh"

namespace llmq::cuda {

// `Weight` (rows.cuh, bitmap_tiles.cuh) says how a warp's rows of a chunk come to shared memory and
// from there to A fragments: its load gives each lane, of 32 inputs a part, units of 4 or 8 inputs
// as `floats` or mma want them.
template <class Weight, class X, int kT, int kGroup>
__global__ void __launch_bounds__(kThreads, (Plan<Weight, X, kT, kGroup>::kBlocks))
    small_gemm(const SmallGemm g) {
  using Sum = typename X::Sum;
  using P = Plan<Weight, X, kT, kGroup>;
  using F = Folds<Weight, X, kGroup>;
  using Total = std::conditional_t<F::kFolds, float, Sum>;
  constexpr int kStages = P::kStages;

  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int n0 = static_cast<int>(blockIdx.y) * kBlockOutputs;
  const int m0 = static_cast<int>(blockIdx.x) * P::kTokens;
  const int chunks = (g.K + Weight::kChunk - 1) / Weight::kChunk;
  const auto slice = [&](unsigned z) {
    return static_cast<int>(static_cast<int64_t>(chunks) * z / g.splits);
  };
  const int begin = slice(blockIdx.z), end = slice(blockIdx.z + 1);

  unsigned char* const stages = ptx::shared_memory();
  auto* const output_scales = reinterpret_cast<FloatWord*>(stages + P::kScales + warp * F::kBytes);
  auto* const token_scales =
      reinterpret_cast<float*>(stages + P::kScales + warp * F::kBytes + F::kOutputBytes);
  Weight weight(g, n0 + warp * kWarpOutputs, begin, lane);
  const Tokens<X, P::kTokens, P::kTokenBytes> tokens(g, m0, thread);

  const auto next = [](int stage) { return stage == kStages - 1 ? 0 : stage + 1; };
  int copied = 0;  // the stage that the next copy goes to
  const auto copy = [&](int chunk) {
    if (chunk < end) {
      unsigned char* const stage = stages + copied * P::kStageBytes;
      weight.copy(stage + warp * Weight::kStageBytes, chunk, lane);
      tokens.copy(stage + P::kWeightBytes, chunk);
    }
    copied = next(copied);
    ptx::cp_async_commit();  // also when empty: waits count groups
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) copy(begin + i);

  // Of one output and one token a lane.
  GroupRow<kGroup, F::kOutputs ? F::kChunk : 0, Weight::kBits> of_output(
      ptx::min(n0 + thread, g.N - 1), g.groups, g.K, begin);
  GroupRow<kGroup, F::kTokens ? F::kChunk : 0, 8> of_token(ptx::min(m0 + lane, g.M - 1), g.x_groups,
                                                           g.K, begin);
  const auto fetch_scales = [&](int chunk) {
    if (chunk >= end) return;
    of_output.fetch(g.scale, g.zero_point, chunk);
    of_token.fetch(g.x_scale, nullptr, chunk);
  };
  const auto store_scales = [&] {
    of_output.unpack([&](int fold, float scale, int zero_point) {
      FloatWord entry{scale, static_cast<uint32_t>(zero_point)};
      if constexpr (!X::kCodes) {
        entry.word = zero_word<Weight::kBits>(zero_point, typename X::Element{});
      }
      ptx::st_shared(output_scales + fold * 32 + lane, entry);
    });
    of_token.unpack([&](int fold, float scale, int) {
      ptx::st_shared(token_scales + fold * 32 + lane, scale);
    });
  };
  fetch_scales(begin);
  store_scales();

  Sum sums[kTiles][kT][4] = {};
  int32_t of_ones[kT][4] = {};  // sums of codes, for kZeros
  Total totals[kTiles][kT][4] = {};
  FloatWord scales[kTiles][2] = {};
  uint32_t zero[kTiles][2] = {};
  if constexpr (!X::kCodes && !F::kFolds) {
    const uint32_t none =
        zero_word<Weight::kBits>(Weight::kBits == 4 ? 8 : 0, typename X::Element{});
    for (auto& of_tile : zero) of_tile[0] = of_tile[1] = none;
  }

  const auto enter_group = [&](int fold) {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      if constexpr (F::kOutputs) {
        scales[i / 2][i % 2] = ptx::ld_shared(output_scales + fold * 32 + i * 8 + lane / 4);
        zero[i / 2][i % 2] = scales[i / 2][i % 2].word;
      }
#pragma unroll
      for (int t = 0; t < kT; ++t) {
        for (auto& sum : sums[i / 2][t]) sum = 0;
      }
    }
    if constexpr (F::kZeros) {
      for (auto& of_token_ones : of_ones) {
        for (auto& sum : of_token_ones) sum = 0;
      }
    }
  };
  // Sums of a group, times its scales, go to the totals.
  const auto leave_group = [&](int fold) {
#pragma unroll
    for (int t = 0; t < kT; ++t) {
      Words2 x_scale{};  // of two tokens
      if constexpr (F::kTokens) {
        const float* const from = token_scales + fold * 32 + t * kTokenTile + lane % 4 * 2;
        x_scale = ptx::ld_shared(reinterpret_cast<const Words2*>(from));
      }
#pragma unroll
      for (int r = 0; r < kTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float scale = scales[r][i / 2].value;
          if constexpr (F::kZeros) {
            const int zero_point = static_cast<int>(zero[r][i / 2]);
            sums[r][t][i] -= zero_point * of_ones[t][i];
          }
          const auto sum = static_cast<float>(sums[r][t][i]);
          if constexpr (F::kTokens && F::kOutputs) {
            totals[r][t][i] += sum * ptx::float_of(x_scale.word[i % 2]) * scale;
          } else if constexpr (F::kTokens) {
            totals[r][t][i] += sum * ptx::float_of(x_scale.word[i % 2]);
          } else {
            totals[r][t][i] += sum * scale;
          }
        }
      }
    }
  };

  int read = 0;  // the stage of the chunk
  for (int chunk = begin; chunk < end; ++chunk) {
    ptx::cp_async_wait<kStages - 2>();
    ptx::barrier();  // the chunk is there for all, and all have read the one before
    copy(chunk + kStages - 1);
    if constexpr (F::kFolds) fetch_scales(chunk + 1);
    const unsigned char* const stage = stages + read * P::kStageBytes;
    const unsigned char* const w_stage = stage + warp * Weight::kStageBytes;
    const unsigned char* const x_stage = stage + P::kWeightBytes;
    read = next(read);
#pragma unroll(Weight::kPairs / P::kTrips)
    for (int pair = 0; pair < Weight::kPairs; ++pair) {
      uint32_t words[kTiles][Weight::kWords];
#pragma unroll
      for (int r = 0; r < kTiles; ++r) weight.load(words[r], w_stage, r, pair, lane);
#pragma unroll
      for (int part = 0; part < Weight::kParts; ++part) {
        const int block = pair * Weight::kParts + part;  // of 32 inputs
        if (F::kFolds && block % F::kBlocks == 0) enter_group(block / F::kBlocks);
        uint32_t b[kT][X::kSteps][2];
#pragma unroll
        for (int t = 0; t < kT; ++t) {
          const int token = t * kTokenTile + lane / 4;
          X::load(b[t], x_stage + token * P::kTokenBytes, block, token, lane);
          if constexpr (F::kZeros) {
            constexpr uint32_t kOnes[4] = {0x01010101, 0x01010101, 0x01010101, 0x01010101};
            ptx::mma(of_ones[t], kOnes, b[t][0], int8_t{});
          }
        }
#pragma unroll
        for (int r = 0; r < kTiles; ++r) {
#pragma unroll
          for (int step = 0; step < X::kSteps; ++step) {
            if constexpr (X::kCodes && Weight::kBits == 8) {
#pragma unroll
              for (int t = 0; t < kT; ++t) ptx::mma(sums[r][t], words[r], b[t][step], int8_t{});
            } else if constexpr (X::kCodes) {
              uint32_t a[4];
              Weight::codes(words[r], part, a);
#pragma unroll
              for (int t = 0; t < kT; ++t) ptx::mma(sums[r][t], a, b[t][step], int8_t{});
            } else {
              using Element = typename X::Element;
              std::conditional_t<F::kFolds, Element, WithoutZeroPoint<Element>> type{};
              uint32_t a[4];
              Weight::floats(words[r], part, step, zero[r], a, type);
#pragma unroll
              for (int t = 0; t < kT; ++t) ptx::mma(sums[r][t], a, b[t][step], type);
            }
          }
        }
        if (F::kFolds && block % F::kBlocks == F::kBlocks - 1) leave_group(block / F::kBlocks);
      }
    }
    if constexpr (F::kFolds) {
      ptx::sync_warp();  // all lanes have read the scales of this chunk
      store_scales();
    }
  }
  ptx::cp_async_wait<0>();
  ptx::barrier();  // the stages have been read: reduce writes there

  Total all[kTiles * kT * 4];
#pragma unroll
  for (int i = 0; i < kTiles * kT * 4; ++i) {
    const int r = i / (kT * 4), t = i / 4 % kT;
    if constexpr (F::kFolds) {
      all[i] = totals[r][t][i % 4];
    } else {
      all[i] = sums[r][t][i % 4];
    }
  }
  const auto token_of = [&](int i) { return m0 + i / 4 % kT * kTokenTile + lane % 4 * 2 + i % 2; };
  const auto output_of = [&](int i) {
    return n0 + warp * kWarpOutputs + i / (kT * 4) * kTileRows + i % 4 / 2 * 8 + lane / 4;
  };
  const auto wanted = [&](int i) { return token_of(i) < g.M && output_of(i) < g.N; };
  if (!reduce(g, all, wanted)) return;
#pragma unroll
  for (int i = 0; i < kTiles * kT * 4; ++i) {
    if (!wanted(i)) continue;
    const int m = token_of(i), n = output_of(i);
    float y = static_cast<float>(all[i]);
    if (X::kCodes && !F::kTokens) y = ptx::mul(y, ptx::ld_global(g.x_scale + m));
    if (!F::kOutputs && g.scale != nullptr) y = ptx::mul(y, ptx::ld_global(g.scale + n));
    if (g.bias != nullptr) y = ptx::add(y, load_float(g.bias, g.bias_dtype, n));
    store_float(g.y, g.y_dtype, static_cast<int64_t>(m) * g.N + n, y);
  }
}

}  // namespace llmq::cuda
