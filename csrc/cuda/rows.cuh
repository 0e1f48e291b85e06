// Canonical rows as the weights of small_gemm.cuh: 128 bytes of each of a warp's 32 rows a chunk.
//
// cp.async takes whole rows of 128 bytes, 8 lanes each: 4 full sectors. Units of 16 bytes stand in
// shared memory at (unit ^ row % 8), so that neither the copy nor ldmatrix, which reads one unit of
// 8 rows at once, meets a bank twice. Lane 4·g + t gets word t of a unit of rows g and g + 8: 4
// inputs of 8 bits or 8 of 4 bits, which are columns 4t … or 8t … of mma in whatever order
// conversion gives them, as x is read in the same one.
#pragma once

#include "block_plan.cuh"
#include "fragments.cuh"
#include "kernels.h"
#include "ptx.cuh"

namespace llmq::cuda {

template <int kWeightBits>
struct Rows {
  static constexpr int kBits = kWeightBits;
  static constexpr bool kGroups = true;  // of weights that share a scale
  static constexpr int kChunk = chunk_inputs(kBits);
  static constexpr int kParts = 8 / kBits;  // of 32 inputs in two units
  static constexpr int kPairs = kUnits / 2, kWords = 4;
  static constexpr int kStageBytes = kWarpOutputs * kUnits * 16;

  const unsigned char* from;  // of this lane: one row in four
  int row_bytes, unit;
  int rows;   // that there are from the lane's first
  int to[2];  // in a stage, of even and odd copies

  LLMQ_PTX Rows(const SmallGemm& g, int first, int, int lane)
      : row_bytes(g.K / 8 * kBits), unit(lane % kUnits) {
    const int mine = lane / kUnits;
    rows = g.N - first - mine;
    from = static_cast<const unsigned char*>(g.weight) +
           static_cast<int64_t>(first + mine) * row_bytes;
#pragma unroll
    for (int i = 0; i < 2; ++i) to[i] = mine * 128 + (unit ^ (i * 4 + mine)) * 16;
  }

  // Past K a row's end is read again, for inputs that are 0; rows past N are not read.
  LLMQ_PTX void copy(unsigned char* stage, int chunk, int) const {
    const unsigned char* const at = from + ptx::min((chunk * kUnits + unit) * 16, row_bytes - 16);
#pragma unroll
    for (int i = 0; i < kWarpOutputs / 4; ++i) {
      ptx::cp_async_16_once(stage + i * 512 + to[i % 2], at + int64_t{i * 4} * row_bytes,
                            i * 4 < rows ? 16 : 0);
    }
  }

  // Units 2·pair and 2·pair + 1 of tile r: words 0 and 1 of rows g and g + 8, then words 2 and 3.
  LLMQ_PTX static void load(uint32_t (&words)[4], const unsigned char* stage, int r, int pair,
                            int lane) {
    const int row = r * kTileRows + lane % 16;
    ptx::ldmatrix_x4(words, stage + row * 128 + ((2 * pair + lane / 16) ^ lane % 8) * 16);
  }

  // The A fragment of 32 inputs of 4 bits as int8 codes.
  LLMQ_PTX static void codes(const uint32_t (&words)[4], int part, uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) int4_codes(words[2 * part + i], a[i], a[i + 2]);
  }

  // The A fragment of a step of 16 inputs.
  template <class T>
  LLMQ_PTX static void floats(const uint32_t (&words)[4], int part, int step,
                              const uint32_t (&zero)[2], uint32_t (&a)[4], T type) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // rows g, g + 8
      if constexpr (kBits == 8) {
        int8_pairs(words[2 * step + i], zero[i], a[i], a[i + 2], type);
      } else {
        int4_pairs(words[2 * part + i] >> (8 * step), zero[i], a[i], a[i + 2], type);
      }
    }
  }
};

}  // namespace llmq::cuda
