// How a block of small_gemm.cuh shares out its work, and what it holds in shared memory:
//
//     stages   kStages of { weights: kWarps × Weight::kStageBytes | inputs: kTokens × kTokenBytes }
//     scales   kWarps of { [kChunk, 32] of outputs | [kChunk, 32] of tokens }, where they fold
//
// Stages hide the latency of memory; a second block on a multiprocessor works while the first waits
// at the barrier of a chunk. Of both there are as many as shared memory and registers allow.
#pragma once

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
// kGroup: so many inputs share a scale, or all of a row (and no zero point), or a multiple of 32.
inline constexpr int kOneScale = 0, kAnyGroup = 1;
static_assert(kWarps * kWarpOutputs == kBlockOutputs);

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
  // A multiprocessor: three where 168 registers do, and the 228 KB of an H100, each with 1 KB more.
  static constexpr bool kLight =
      kGroup != kAnyGroup && (kT == 1 || (kT == 2 && !Folds<Weight, X, kGroup>::kZeros));
  // Unrolled in full, the loop of 4-bit weights would take more registers than there are.
  static constexpr int kTrips = Weight::kBits == 8                        ? 1
                                : Folds<Weight, X, kGroup>::kInputs == 32 ? (kT == 4 ? 4 : 2)
                                                                          : (kT == 4 ? 2 : 1);
  static constexpr int kBlocks = kLight && 3 * (kBytes + 1024) <= 228 * 1024 ? 3 : 2;
  static_assert(kBytes <= 99 * 1024);  // what a block may have on every GPU
};

}  // namespace llmq::cuda
