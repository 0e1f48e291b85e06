// y = x Wᵀ for few tokens: the loop that weight_only, int8 and bitmap-sparse GEMMs share.
//
//     block   4 warps · 128 outputs × 8T tokens × a K-slice; grid (tokens, outputs, slices)
//     warp    32 of the outputs, 2 tiles of mma; all warps share the tokens
//     chunk   128 bytes of each row of weights (16 KB) and its inputs of each token, kStages of
//             them on their way by cp.async; one barrier a chunk
//
// The weights are the rows of mma (16) and the tokens its columns (8): one token costs no more than
// eight. Each lane keeps its sums in registers to the end; those of the slices meet in global memory,
// where the last block to arrive adds them in order: the result does not depend on timing. Read
// bandwidth bounds it; what it reaches is not yet measured (benchmarks/results/static has bounds).
#pragma once

#include <algorithm>
#include <type_traits>

#include "floats.cuh"
#include "fragments.cuh"
#include "kernels.h"
#include "ptx.cuh"

namespace llmq::cuda {

inline constexpr int kWarps = 4;
inline constexpr int kThreads = 32 * kWarps;
inline constexpr int kTokenTile = 8;
inline constexpr int kTiles = 2;  // of outputs, a warp
inline constexpr int kTileRows = 16;
inline constexpr int kWarpOutputs = kTiles * kTileRows;
inline constexpr int kUnits = 8;  // of 16 bytes of weights, a row and chunk
inline constexpr int kLongGroup = 128;
static_assert(kWarps * kWarpOutputs == kBlockOutputs);

LLMQ_PTX int least(int a, int b) { return a < b ? a : b; }

// -- x -----------------------------------------------------------------------------------------------
// A token's inputs of a chunk are a row in shared memory, in units of 16 bytes at
// (unit ^ swizzle(token)), so that neither copies nor loads meet a bank twice.

// In f16 or bf16, multiplied with weights of so many bits that were converted to it.
template <class T, int kBits>
struct Floats {
  using Sum = float;
  using Element = T;
  static constexpr bool kCodes = false, kFoldsTokens = false;
  static constexpr int kSize = 2, kSteps = 2;  // bytes an input; mma for each 32 inputs

  LLMQ_PTX static int swizzle(int token) { return kBits == 8 ? token % 4 * 2 : token % 2 * 4; }

  // B fragments of 32 inputs of a token. Four bits: in the order in which int4_pairs leaves them.
  LLMQ_PTX static void load(uint32_t (&b)[kSteps][2], const unsigned char* row, int block,
                            int token, int lane) {
    if constexpr (kBits == 8) {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const int unit = (block * 4 + step * 2 + lane % 4 / 2) ^ swizzle(token);
        const auto* from = reinterpret_cast<const Words2*>(row + unit * 16 + lane % 2 * 8);
        const Words2 w = ptx::ld_shared(from);
        b[step][0] = w.word[0], b[step][1] = w.word[1];
      }
    } else {
      const int unit = (block * 4 + lane % 4) ^ swizzle(token);
      const Words4 w = ptx::ld_shared(reinterpret_cast<const Words4*>(row + unit * 16));
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        b[step][0] = ptx::prmt(w.word[step], w.word[step + 2], 0x5410);
        b[step][1] = ptx::prmt(w.word[step], w.word[step + 2], 0x7632);
      }
    }
  }
};

// As int8 codes; with kGroups each group of inputs has its own scale.
template <bool kGroups>
struct Codes {
  using Sum = int32_t;
  static constexpr bool kCodes = true, kFoldsTokens = kGroups;
  static constexpr int kSize = 1, kSteps = 1;

  LLMQ_PTX static int swizzle(int token) { return token % 8; }
  LLMQ_PTX static void load(uint32_t (&b)[kSteps][2], const unsigned char* row, int block,
                            int token, int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int unit = (block * 2 + i) ^ swizzle(token);
      b[0][i] = ptx::ld_shared(reinterpret_cast<const uint32_t*>(row + unit * 16 + lane % 4 * 4));
    }
  }
};

// -- the kernel --------------------------------------------------------------------------------------

// Which chunks, and so which groups of scales, a block works on.
struct Slice {
  int begin, end;  // chunks
  int group;       // inputs
  int first_group, groups;

  LLMQ_PTX Slice(const SmallGemm& g, int chunk, int all_groups) {
    const int chunks = (g.K + chunk - 1) / chunk;
    const int z = static_cast<int>(blockIdx.z);
    begin = static_cast<int>(static_cast<int64_t>(chunks) * z / g.splits);
    end = static_cast<int>(static_cast<int64_t>(chunks) * (z + 1) / g.splits);
    group = all_groups == 1 ? chunks * chunk : g.K / all_groups;
    first_group = begin * chunk / group;
    const int last = (least(end * chunk, g.K) - 1) / group;
    groups = end > begin ? last - first_group + 1 : 0;
  }
};

// Shared memory: the stages, then the scales of the slice.
template <class Weight, class X, int kT>
struct Plan {
  static constexpr int kTokens = kTokenTile * kT;
  static constexpr int kTokenBytes = Weight::kChunk * X::kSize;
  static constexpr int kWeightBytes = kWarps * Weight::kStageBytes;
  static constexpr int kStageBytes = kWeightBytes + kTokens * kTokenBytes;
  static constexpr int kStages = 3 * kStageBytes <= 80 * 1024 ? 3 : 2;
  static constexpr int kScaleRows = X::kFoldsTokens ? kTokens : X::kCodes ? 0 : kBlockOutputs;
  static constexpr int kBytes = kStages * kStageBytes;
  static constexpr int kBlocks = kT <= 2 ? 3 : 2;  // a multiprocessor, for registers
  static constexpr int kGroupBytes = kScaleRows * static_cast<int>(sizeof(FloatWord));
  // What a block may have on every GPU that the kernels are built for.
  static_assert(kBytes + Weight::kTableBytes + kMaxGroups * kGroupBytes <= 99 * 1024);
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
      entry.word = zero_word<Weight::kBits>(zero_point, typename X::Element{});
    }
    ptx::st_shared(table + i, entry);
  }
}

// Copies a chunk of the block's tokens, those past M excepted.
template <class X, int kTokenBytes>
LLMQ_PTX void copy_tokens(const SmallGemm& g, int m0, int tokens, int chunk, unsigned char* stage) {
  constexpr int kRowUnits = kTokenBytes / 16;
  for (int i = static_cast<int>(threadIdx.x); i < tokens * kRowUnits; i += kThreads) {
    const int token = i / kRowUnits, unit = i % kRowUnits;
    const int at = chunk * kTokenBytes + unit * 16, row_bytes = g.K * X::kSize;
    const auto* from = static_cast<const unsigned char*>(g.x) +
                       static_cast<int64_t>(m0 + token) * row_bytes + least(at, row_bytes - 16);
    ptx::cp_async_16(stage + token * kTokenBytes + (unit ^ X::swizzle(token)) * 16, from,
                     at < row_bytes ? 16 : 0);
  }
}

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

// `Weight` says how a warp's rows of a chunk come to shared memory and from there to A fragments. Its
// load gives each lane, of 32 inputs a part, units of 4 or 8 inputs as `floats` or mma want them.
// kLong: groups are multiples of kLongGroup inputs, so that most blocks need not ask whether one ends.
template <class Weight, class X, int kT, bool kLong>
__global__ void __launch_bounds__(kThreads, (Plan<Weight, X, kT>::kBlocks))
    small_gemm(const SmallGemm g) {
  using Sum = typename X::Sum;
  using P = Plan<Weight, X, kT>;
  constexpr int kTokens = P::kTokens, kStages = P::kStages, kScaleRows = P::kScaleRows;
  constexpr bool kFolds = !X::kCodes || X::kFoldsTokens;
  using Total = std::conditional_t<kFolds, float, int32_t>;
  constexpr int kBlocks = Weight::kPairs * Weight::kParts;  // of 32 inputs, a chunk
  constexpr int kAsked = !kLong ? 1 : kBlocks < kLongGroup / 32 ? kBlocks : kLongGroup / 32;

  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int n0 = static_cast<int>(blockIdx.y) * kBlockOutputs;
  const int m0 = static_cast<int>(blockIdx.x) * kTokens;
  const int tokens = least(kTokens, g.M - m0);
  const Slice slice(g, Weight::kChunk, X::kFoldsTokens ? g.x_groups : g.groups);

  unsigned char* const stages = ptx::shared_memory();
  auto* const table = reinterpret_cast<FloatWord*>(stages + P::kBytes + Weight::kTableBytes);
  Weight weight(g, n0 + warp * kWarpOutputs, lane);

  const auto copy = [&](int chunk) {
    if (chunk < slice.end) {
      unsigned char* const stage = stages + (chunk - slice.begin) % kStages * P::kStageBytes;
      weight.copy(stage + warp * Weight::kStageBytes, chunk, lane);
      copy_tokens<X, P::kTokenBytes>(g, m0, tokens, chunk, stage + P::kWeightBytes);
    }
    ptx::cp_async_commit();  // also when empty: waits count groups
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) copy(slice.begin + i);
  for (int stage = 0; stage < kStages; ++stage) {  // tokens past M stay zero
    unsigned char* const x = stages + stage * P::kStageBytes + P::kWeightBytes;
    for (int i = tokens * P::kTokenBytes / 16 + thread; i < kTokens * P::kTokenBytes / 16;
         i += kThreads) {
      ptx::st_shared(reinterpret_cast<Words4*>(x) + i, Words4{});
    }
  }
  if constexpr (Weight::kTableBytes > 0) Weight::fill_table(stages + P::kBytes);
  if constexpr (kFolds) {
    load_scales<Weight, X>(g, slice, X::kFoldsTokens ? m0 : n0, kScaleRows, table);
  }

  Sum sums[kTiles][kT][4] = {};
  Total totals[kTiles][kT][4] = {};
  int group = 0, in_group = slice.begin * Weight::kChunk % slice.group;
  uint32_t zero[kTiles][2] = {};

  const auto enter_group = [&] {
    if constexpr (!X::kCodes) {
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        const int row = warp * kWarpOutputs + i * 8 + lane / 4;
        zero[i / 2][i % 2] = ptx::ld_shared(&table[group * kScaleRows + row].word);
      }
    }
  };
  // Sums of a group, times its scale, go to the totals.
  const auto fold = [&] {
    if constexpr (kFolds) {
#pragma unroll
      for (int r = 0; r < kTiles; ++r) {
#pragma unroll
        for (int t = 0; t < kT; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = X::kFoldsTokens
                                ? t * kTokenTile + lane % 4 * 2 + i % 2
                                : warp * kWarpOutputs + r * kTileRows + i / 2 * 8 + lane / 4;
            const float scale = ptx::ld_shared(&table[group * kScaleRows + row].value);
            totals[r][t][i] += static_cast<float>(sums[r][t][i]) * scale;
            sums[r][t][i] = 0;
          }
        }
      }
    }
  };

  for (int chunk = slice.begin; chunk < slice.end; ++chunk) {
    ptx::cp_async_wait<kStages - 2>();
    ptx::barrier();  // the chunk is there for all, and all have read the one before
    copy(chunk + kStages - 1);
    if (chunk == slice.begin) enter_group();
    const unsigned char* const stage = stages + (chunk - slice.begin) % kStages * P::kStageBytes;
    const unsigned char* const w_stage = stage + warp * Weight::kStageBytes;
    const unsigned char* const x_stage = stage + P::kWeightBytes;
#pragma unroll
    for (int pair = 0; pair < Weight::kPairs; ++pair) {
      uint32_t words[kTiles][Weight::kWords];
#pragma unroll
      for (int r = 0; r < kTiles; ++r) {
        weight.load(words[r], w_stage, stages + P::kBytes, r, pair, lane);
      }
#pragma unroll
      for (int part = 0; part < Weight::kParts; ++part) {
        const int block = pair * Weight::kParts + part;  // of 32 inputs
        uint32_t b[kT][X::kSteps][2];
#pragma unroll
        for (int t = 0; t < kT; ++t) {
          const int token = t * kTokenTile + lane / 4;
          X::load(b[t], x_stage + token * P::kTokenBytes, block, token, lane);
        }
#pragma unroll
        for (int r = 0; r < kTiles; ++r) {
#pragma unroll
          for (int step = 0; step < X::kSteps; ++step) {
            if constexpr (X::kCodes) {
#pragma unroll
              for (int t = 0; t < kT; ++t) ptx::mma(sums[r][t], words[r], b[t][step], int8_t{});
            } else {
              typename X::Element type{};
              uint32_t a[4];
              Weight::floats(words[r], part, step, zero[r], a, type);
#pragma unroll
              for (int t = 0; t < kT; ++t) ptx::mma(sums[r][t], a, b[t][step], type);
            }
          }
        }
        if (kFolds && block % kAsked == kAsked - 1) {
          in_group += 32 * kAsked;
          if (in_group == slice.group) {
            fold();
            in_group = 0;
            if (chunk * Weight::kChunk + block * 32 + 32 < least(slice.end * Weight::kChunk, g.K)) {
              ++group;
              enter_group();
            }
          }
        }
      }
    }
  }
  if (slice.begin < slice.end && in_group > 0) fold();
  ptx::cp_async_wait<0>();
  ptx::barrier();  // the stages have been read: reduce writes there

  Total all[kTiles * kT * 4];
#pragma unroll
  for (int i = 0; i < kTiles * kT * 4; ++i) {
    if constexpr (kFolds) {
      all[i] = totals[i / (kT * 4)][i / 4 % kT][i % 4];
    } else {
      all[i] = sums[i / (kT * 4)][i / 4 % kT][i % 4];
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
  const int groups = X::kFoldsTokens ? g.x_groups : g.groups;
  const Launch grid{static_cast<unsigned>(ceil_div(g.M, P::kTokens)),
                    static_cast<unsigned>(ceil_div(g.N, kBlockOutputs)),
                    static_cast<unsigned>(g.splits),
                    kThreads,
                    P::kBytes + Weight::kTableBytes +
                        static_cast<size_t>(std::min(groups, kMaxGroups)) * P::kGroupBytes,
                    stream};
  if constexpr (X::kFoldsTokens || (!X::kCodes && Weight::kGroups)) {
    if (groups > 1 && g.K / groups % kLongGroup != 0) {
      return launch(small_gemm<Weight, X, kT, false>, grid, g);
    }
  }
  launch(small_gemm<Weight, X, kT, true>, grid, g);
}

template <class Weight, class X>
void launch_small_gemm(const SmallGemm& g, void* stream) {
  switch (block_tokens(g.M)) {
    case 8:
      return launch_tiles<Weight, X, 1>(g, stream);
    case 16:
      return launch_tiles<Weight, X, 2>(g, stream);
    default:
      return launch_tiles<Weight, X, 4>(g, stream);
  }
}

}  // namespace llmq::cuda
