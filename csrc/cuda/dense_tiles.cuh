// tiles8 and tiles4 (kernels.h) as the weights of small_gemm.cuh.
#pragma once

#include "small_gemm.cuh"

namespace llmq::cuda {

// Tiles of equal size, of which each lane copies what it will read.
template <int kTileCount, int kBytes>
struct DenseTiles {
  static constexpr int kTiles = kTileCount, kTileBytes = kBytes;

  const unsigned char* tiles;
  int64_t row_bytes;  // of one row of tiles
  int rows;           // of tiles that there are, from the block's first

  LLMQ_PTX DenseTiles(const SmallGemm& g, int first)
      : row_bytes((g.K + kTileInputs - 1) / kTileInputs * static_cast<int64_t>(kBytes)),
        rows((g.N + kTileRows - 1) / kTileRows - first) {
    tiles = static_cast<const unsigned char*>(g.weight) + first * row_bytes;
  }

  LLMQ_PTX void copy(unsigned char* stage, int chunk, int lane) const {
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
      const unsigned char* from = tiles + static_cast<int64_t>(chunk) * kBytes;
      if (r < rows) from += r * row_bytes;
#pragma unroll
      for (int at = 0; at < kBytes; at += 512) {
        ptx::cp_async_16_once(stage + r * kBytes + at + lane * 16, from + at + lane * 16,
                              r < rows ? 16 : 0);
      }
    }
  }
};

struct Int8Tiles : DenseTiles<2, kTileWeights> {
  static constexpr Weights kWeights = Weights::int8;
  static constexpr int kBits = 8;
  using Words = Words4;  // of half a chunk
  using DenseTiles::DenseTiles;

  LLMQ_PTX void load(Words& words, const unsigned char* stage, int r, int half, int lane) const {
    const unsigned char* from = stage + r * kTileBytes + half * 512 + lane * 16;
    words = ptx::ld_shared(reinterpret_cast<const Words4*>(from));
  }
  LLMQ_PTX static void codes(const Words& words, uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = words.word[i];
  }
  template <class T>
  LLMQ_PTX static void floats(const Words& words, int, int step, uint32_t zero0, uint32_t zero8,
                              uint32_t (&a)[4], T type) {
    int8_pairs(words.word[2 * step], zero0, a[0], a[2], type);
    int8_pairs(words.word[2 * step + 1], zero8, a[1], a[3], type);
  }
};

struct Int4Tiles : DenseTiles<4, kTileWeights / 2> {
  static constexpr Weights kWeights = Weights::int4;
  static constexpr int kBits = 4;
  using Words = Words4;  // of a whole chunk
  using DenseTiles::DenseTiles;

  LLMQ_PTX void load(Words& words, const unsigned char* stage, int r, int half, int lane) const {
    if (half != 0) return;
    words = ptx::ld_shared(reinterpret_cast<const Words4*>(stage + r * kTileBytes + lane * 16));
  }
  template <class T>
  LLMQ_PTX static void floats(const Words& words, int half, int step, uint32_t zero0,
                              uint32_t zero8, uint32_t (&a)[4], T type) {
    int4_fragment(words.word[2 * half + step], zero0, zero8, a, type);
  }
};

}  // namespace llmq::cuda
