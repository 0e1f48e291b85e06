// y = x Wᵀ for few tokens: the loop that weight_only, int8 and bitmap-sparse GEMMs share.
//
//     block   4 warps · 128 outputs × 8T tokens × a K-slice; grid (tokens, outputs, slices)
//     warp    32 of the outputs, 2 tiles of mma; all warps share the tokens
//     chunk   128 bytes of each row of weights (16 KB) and its inputs of each token, kStages of
//             them on their way by cp.async; one barrier a chunk
//
// The weights are the rows of mma (16) and the tokens its columns (8): one token costs no more than
// eight. Each lane keeps its sums in registers to the end; those of the slices meet in global
// memory, where the last block to arrive adds them in order: the result does not depend on timing.
// Where a group's scale enters is known to the compiler (kGroup), which leaves nothing to ask in
// the loop. Read bandwidth bounds it; what it reaches is not yet measured. What instructions,
// shared memory and bytes on their way allow is in benchmarks/results/static/cuda.json.
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
// Of inputs that share a scale: one a row (and no zero point), or so many inputs, or any multiple
// of 32.
inline constexpr int kOneScale = 0, kAnyGroup = 1;
static_assert(kWarps * kWarpOutputs == kBlockOutputs);

LLMQ_PTX int least(int a, int b) { return a < b ? a : b; }

// Inputs

// A token's inputs of a chunk are a row in shared memory, in units of 16 bytes at
// (unit ^ swizzle(token)), so that neither copies nor loads meet a bank twice.

// Where a unit is, the sum of one that is known to the compiler and of the lane's: 128 bytes on it
// is the same address and an offset.
LLMQ_PTX int place(int unit, int of_lane, int swizzle) {
  return (unit / 8 * 8 + ((unit % 8 + of_lane) ^ swizzle)) * 16;
}

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
        const int at = place(block * 4 + step * 2, lane % 4 / 2, swizzle(token)) + lane % 2 * 8;
        const auto* from = reinterpret_cast<const Words2*>(row + at);
        const Words2 w = ptx::ld_shared(from);
        b[step][0] = w.word[0], b[step][1] = w.word[1];
      }
    } else {
      const int at = place(block * 4, lane % 4, swizzle(token));
      const Words4 w = ptx::ld_shared(reinterpret_cast<const Words4*>(row + at));
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        b[step][0] = ptx::prmt(w.word[step], w.word[step + 2], 0x5410);
        b[step][1] = ptx::prmt(w.word[step], w.word[step + 2], 0x7632);
      }
    }
  }
};

// As int8 codes; with kGroups each group of inputs has its own scale.
template <bool kGroups, int kBits = 8>
struct Codes {
  using Sum = int32_t;
  static constexpr bool kCodes = true, kFoldsTokens = kGroups;
  static constexpr int kSize = 1, kSteps = 1;

  LLMQ_PTX static int swizzle(int token) { return kBits == 8 ? token % 8 : token % 4 * 2; }

  // Four bits: in the order in which int4_codes leaves them.
  LLMQ_PTX static void load(uint32_t (&b)[kSteps][2], const unsigned char* row, int block,
                            int token, int lane) {
    if constexpr (kBits == 8) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = place(block * 2 + i, 0, swizzle(token)) + lane % 4 * 4;
        b[0][i] = ptx::ld_shared(reinterpret_cast<const uint32_t*>(row + at));
      }
    } else {
      const int at = place(block * 2, lane % 4 / 2, swizzle(token)) + lane % 2 * 8;
      const Words2 w = ptx::ld_shared(reinterpret_cast<const Words2*>(row + at));
      b[0][0] = ptx::prmt(w.word[0], w.word[1], 0x6420);
      b[0][1] = ptx::prmt(w.word[0], w.word[1], 0x7531);
    }
  }
};

// A thread's share of the tokens of each chunk, those past M and inputs past K as zeros.
template <class X, int kTokens, int kTokenBytes>
class Tokens {
  static constexpr int kRowUnits = kTokenBytes / 16;
  static constexpr int kStep =
      kThreads / kRowUnits;  // tokens; a multiple of what swizzles repeat in
  static constexpr int kCopies = (kTokens + kStep - 1) / kStep;

  const unsigned char* from;
  int row_bytes, unit, to;
  int tokens;  // that there are from the thread's first

 public:
  LLMQ_PTX Tokens(const SmallGemm& g, int m0, int thread)
      : row_bytes(g.K * X::kSize), unit(thread % kRowUnits) {
    const int token = thread / kRowUnits;
    tokens = g.M - m0 - token;
    to = token * kTokenBytes + (unit ^ X::swizzle(token)) * 16;
    from = static_cast<const unsigned char*>(g.x) + static_cast<int64_t>(m0 + token) * row_bytes;
  }

  LLMQ_PTX void copy(unsigned char* stage, int chunk) const {
    const int at = chunk * kTokenBytes + unit * 16;
    const bool inside = at < row_bytes;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (kTokens < kStep && to >= kTokens * kTokenBytes) continue;
      ptx::cp_async_16(stage + to + i * kStep * kTokenBytes,
                       from + at + int64_t{i * kStep} * row_bytes,
                       inside && i * kStep < tokens ? 16 : 0);
    }
  }
};

// Where sums of a chunk are multiplied by their scales, and what that takes.
template <class Weight, class X, int kGroup>
struct Folds {
  static constexpr bool kFolds = kGroup != kOneScale;
  static constexpr int kInputs = kGroup == kAnyGroup ? 32 : kGroup;
  static constexpr int kChunk = kFolds ? Weight::kChunk / kInputs : 0;  // of a chunk
  static constexpr int kBlocks = kFolds ? kInputs / 32 : 1 << 30;       // of 32 inputs, each
  static constexpr bool kTokens = kFolds && X::kFoldsTokens;
  static constexpr bool kOutputs = kFolds && (!X::kCodes || Weight::kBits == 4);
  static constexpr bool kZeros = kOutputs && X::kCodes;  // zero points meet sums, not weights
  // A warp has its own [kChunk, 32]: of its outputs, with what takes zero points away, of tokens.
  static constexpr int kOutputBytes = kOutputs ? kChunk * 32 * int{sizeof(FloatWord)} : 0;
  static constexpr int kBytes = kOutputBytes + (kTokens ? kChunk * 32 * int{sizeof(float)} : 0);
};

// Shared memory: the stages, the scales of a chunk.
template <class Weight, class X, int kT, int kGroup>
struct Plan {
  static constexpr int kTokens = kTokenTile * kT;
  static constexpr int kTokenBytes = Weight::kChunk * X::kSize;
  static constexpr int kWeightBytes = kWarps * Weight::kStageBytes;
  static constexpr int kStageBytes = kWeightBytes + kTokens * kTokenBytes;
  static constexpr int kStages = 3 * kStageBytes <= 80 * 1024 ? 3 : 2;
  static constexpr int kScales = kStages * kStageBytes;
  static constexpr int kBytes = kScales + kWarps * Folds<Weight, X, kGroup>::kBytes;
  // A multiprocessor: three where 168 registers do, and the 228 KB of an H100, of which each
  // takes 1.
  static constexpr bool kLight =
      kGroup != kAnyGroup && (kT == 1 || (kT == 2 && !Folds<Weight, X, kGroup>::kZeros));
  // Unrolled in full, the loop of 4-bit weights would take more registers than there are.
  static constexpr int kTrips = Weight::kBits == 8                        ? 1
                                : Folds<Weight, X, kGroup>::kInputs == 32 ? (kT == 4 ? 4 : 2)
                                                                          : (kT == 4 ? 2 : 1);
  static constexpr int kBlocks = kLight && 3 * (kBytes + 1024) <= 228 * 1024 ? 3 : 2;
  static_assert(kBytes <= 99 * 1024);  // what a block may have on every GPU
};

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
      if (kGroup == kAnyGroup && ++fold == folds) fold = 0, group = least(group + 1, groups - 1);
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

// `Weight` says how a warp's rows of a chunk come to shared memory and from there to A fragments.
// Its load gives each lane, of 32 inputs a part, units of 4 or 8 inputs as `floats` or mma want
// them.
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
      least(n0 + thread, g.N - 1), g.groups, g.K, begin);
  GroupRow<kGroup, F::kTokens ? F::kChunk : 0, 8> of_token(least(m0 + lane, g.M - 1), g.x_groups,
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

// Launch

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
