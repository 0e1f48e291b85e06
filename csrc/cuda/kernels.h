// The contract of every CUDA kernel: what a driver (plain C++, which knows tensors) and a .cu share.
//
// A launcher gets device pointers to checked, sized memory and a stream; it neither allocates nor
// checks nor waits. M tokens, N outputs, K inputs; strides in elements.
//
// Weights stand in tiles of 16 outputs × 64 inputs, in the order in which lane 4·g + t of a warp
// feeds them to mma; llmq/formats/tiles.py packs and unpacks them. The lane owns rows g and g + 8,
// inputs 8t … 8t+7 of each half of 32. Which inputs mma calls columns 2t, 2t+1, … does not matter as
// long as x is read in the same order, so a lane's share of x, too, is 16 bytes in one piece.
//
//     tiles8 [ceil(N/16), ceil(K/64), 2 halves, 32 lanes, 16]   bytes of a unit, inputs 8t + …:
//         | row g, 0 1 2 3 | row g+8, 0 1 2 3 | row g, 4 5 6 7 | row g+8, 4 5 6 7 |
//     tiles4 [ceil(N/16), ceil(K/64), 1, 32 lanes, 16]   nibbles, low to high, of its word 2·half + i,
//         inputs 8t + 4i + …:  | g, 0 | g+8, 0 | g, 2 | g+8, 2 | g, 1 | g+8, 1 | g, 3 | g+8, 3 |
#pragma once

#include <cstdint>

namespace llmq::cuda {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

inline constexpr int kTileRows = 16;
inline constexpr int kTileInputs = 64;
inline constexpr int kTileWeights = kTileRows * kTileInputs;

// y = x Wᵀ for few tokens, where reading the weight takes the time.
struct SmallGemm {
  const void* x;  // [M, x_stride]; int8 codes are zero from K to x_stride, a multiple of 64
  int64_t x_stride;
  Dtype x_dtype;             // of x, where it is not codes
  const float* x_scale;      // [M, x_groups] of codes
  int x_groups;              // of equal size, a multiple of 32 unless there is one
  const void* weight;        // tiles8 or tiles4
  const float* scale;        // [N, groups]; null: 1
  const int8_t* zero_point;  // [N, groups]; null: 0, or 8 for tiles4
  int groups;                // of equal size, a multiple of 32 unless there is one
  const void* bias;          // [N] or null
  Dtype bias_dtype;
  void* y;  // [M, N]
  Dtype y_dtype;
  int M, N, K;
  int splits;          // of K: blocks that share their outputs
  uint32_t* partial;   // [blocks of one split, splits, outputs, tokens], unless splits is 1
  uint32_t* arrivals;  // [blocks of one split], zero, and zero again afterwards
};

enum class Weights : int { int8, int4 };

// How a launcher cuts a SmallGemm: what a block computes, and the blocks of one split.
struct Cut {
  int outputs, tokens;
  int64_t blocks;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 2 KB of weights a chunk of 64 inputs, whatever their size; 8, 16 or 32 tokens.
constexpr Cut cut(Weights weights, int64_t M, int64_t N) {
  const int tiles = weights == Weights::int4 ? 4 : 2;
  const int tokens = M <= 8 ? 8 : M <= 16 ? 16 : 32;
  return {kTileRows * tiles, tokens, ceil_div(N, kTileRows * tiles) * ceil_div(M, tokens)};
}

// Blocks keep the scales of their part of K in shared memory: so many groups at most.
inline constexpr int kMaxGroups = 32;

void weight_only_gemm(const SmallGemm& g, int bits, void* stream);
void int8_gemm(const SmallGemm& g, void* stream);

// quantize_activation: symmetric int8 codes, one scale a token or group of inputs, as
// llmq/formats/activation.py to the bit.
struct QuantizeRows {
  const void* x;  // [M, K]
  Dtype x_dtype;
  int M, K, group_size;  // which divides K
  int8_t* codes;         // [M, codes_stride], zero from K on
  int64_t codes_stride;
  float* scale;  // [M, K / group_size]
};
void quantize_rows(const QuantizeRows& q, void* stream);

}  // namespace llmq::cuda
