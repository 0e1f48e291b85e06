// The contract of every CUDA kernel: what a driver (plain C++, which knows tensors) and a .cu share.
//
// A launcher gets device pointers to checked, sized memory and a stream; it neither allocates nor
// checks nor waits. M tokens, N outputs, K inputs; strides in elements.
#pragma once

#include <cstdint>

namespace llmq::cuda {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

// y = x Wᵀ for few tokens, where reading the weight takes the time. Weights are canonical: rows of
// int8, or of nibbles of which the low one comes first, that begin on 16 bytes; x likewise.
struct SmallGemm {
  const void* x;  // [M, K], f16 or bf16, or int8 codes
  Dtype x_dtype;
  const float* x_scale;      // [M, x_groups] of codes
  int x_groups;              // of equal size, a multiple of 32 unless there is one
  const void* weight;        // [N, K] or [N, K / 2] bytes
  const float* scale;        // [N, groups]; null: 1
  const int8_t* zero_point;  // [N, groups]; null: 0, or 8 of nibbles
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

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a block of a SmallGemm computes. 64 tokens of floats would leave no registers.
inline constexpr int kBlockOutputs = 128;
constexpr int block_tokens(int64_t M, bool codes) {
  return M <= 8 ? 8 : M <= 16 ? 16 : M <= 32 || !codes ? 32 : 64;
}

// Blocks keep the scales of their part of K in shared memory: so many groups at most, those that the
// part shares with its neighbours included.
inline constexpr int kMaxGroups = 16;

void weight_only_gemm(const SmallGemm& g, int bits, void* stream);
void int8_gemm(const SmallGemm& g, void* stream);

// quantize_activation: symmetric int8 codes, one scale a token or group of inputs, as
// llmq/formats/activation.py to the bit.
struct QuantizeRows {
  const void* x;  // [M, K]
  Dtype x_dtype;
  int M, K, group_size;  // which divides K
  int8_t* codes;         // [M, K]
  float* scale;          // [M, K / group_size]
};
void quantize_rows(const QuantizeRows& q, void* stream);

}  // namespace llmq::cuda
