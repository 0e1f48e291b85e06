// Canonical rows as the weights of small_gemm.cuh: 128 bytes of each of a warp's 32 rows a chunk.
//
// cp.async takes whole rows of 128 bytes, 8 lanes each: 4 full sectors. Units of 16 bytes stand in
// shared memory at (unit ^ row % 8), so that neither the copy nor ldmatrix, which reads one unit of
// 8 rows at once, meets a bank twice. Lane 4·g + t gets word t of a unit of rows g and g + 8: 4
// inputs of 8 bits or 8 of 4 bits, which are columns 4t … or 8t … of mma in whatever order
// conversion gives them, as x is read in the same one.
#pragma once

#include "small_gemm.cuh"

namespace llmq::cuda {

template <int kWeightBits>
struct Rows {
  static constexpr int kBits = kWeightBits;
  static constexpr bool kGroups = true;  // of weights that share a scale
  static constexpr int kChunk = chunk_inputs(kBits);
  static constexpr int kParts = 8 / kBits;  // of 32 inputs in two units
  static constexpr int kPairs = kUnits / 2, kWords = 4, kTableBytes = 0;
  static constexpr int kStageBytes = kWarpOutputs * kUnits * 16;

  const unsigned char* from;  // of this lane: a unit of one row in four
  int64_t row_bytes;
  int rows;  // that there are from the lane's first
  int unit, to;

  LLMQ_PTX Rows(const SmallGemm& g, int first, int lane)
      : row_bytes(static_cast<int64_t>(g.K) * kBits / 8),
        rows(g.N - first - lane / kUnits),
        unit(lane % kUnits),
        to(lane / kUnits * 128) {
    from = static_cast<const unsigned char*>(g.weight) + unit * 16;
    if (rows > 0) from += (first + lane / kUnits) * row_bytes;
  }

  LLMQ_PTX void copy(unsigned char* stage, int chunk, int lane) const {
    const int at = chunk * kUnits * 16;
    const bool inside = at + unit * 16 < row_bytes;
#pragma unroll
    for (int i = 0; i < kWarpOutputs / 4; ++i) {
      const bool there = inside && i * 4 < rows;
      const int swizzled = (unit ^ (i * 4 + lane / kUnits) % 8) * 16;
      ptx::cp_async_16_once(stage + i * 512 + to + swizzled,
                            there ? from + i * 4 * row_bytes + at : from, there ? 16 : 0);
    }
  }

  // Units 2·pair and 2·pair + 1 of tile r: word[0], word[1] of rows g, g + 8, then word[2], word[3].
  LLMQ_PTX static void load(uint32_t (&words)[4], const unsigned char* stage, const unsigned char*,
                            int r, int pair, int lane) {
    const int row = r * kTileRows + lane % 16;
    ptx::ldmatrix_x4(words, stage + row * 128 + ((2 * pair + lane / 16) ^ lane % 8) * 16);
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
