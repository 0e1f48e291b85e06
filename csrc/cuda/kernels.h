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
  const void* weight;        // [N, K] or [N, K / 2] bytes; or the values of bitmap tiles
  const uint8_t* bitmask;    // of bitmap tiles, with
  const int64_t* offsets;    // [strips, chunks], in values
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

// What a block of a SmallGemm computes: more tokens would leave no registers. More than 32 read the
// weights again, from L2.
inline constexpr int kBlockOutputs = 128;
constexpr int block_tokens(int64_t M) { return M <= 8 ? 8 : M <= 16 ? 16 : 32; }
constexpr int chunk_inputs(int bits) { return 128 * 8 / bits; }  // 128 bytes of a row

// Blocks keep the scales of their part of K in shared memory: so many groups at most, those that the
// part shares with its neighbours included.
inline constexpr int kMaxGroups = 16;

// Bitmap tiles hold a sparse weight in strips of 32 outputs and chunks of bitmap_chunk inputs
// (llmq/formats/bitmap_tiles.py packs and unpacks them, bitmap_tiles.cuh says what lanes make of them):
//
//     bitmask [strips, chunks, 1, bytes]   | uint16 [8 runs, 2]: its first value, and the units of 16
//         bytes that it and 12 bytes behind it touch, at most 33, of the last 34 |
//         uint32 [32 lanes, chunk / 32]: masks |
//     weight   8 runs of values from offsets[strip, chunk] on, which is on 16 bytes; behind all, 16
//         bytes more
inline constexpr int kBitmapHeader = 32;
constexpr int bitmap_chunk(int value_bytes) { return 128 / value_bytes; }
constexpr int bitmap_mask_bytes(int value_bytes) {
  return kBitmapHeader + 4 * bitmap_chunk(value_bytes);
}

void weight_only_gemm(const SmallGemm& g, int bits, void* stream);
void int8_gemm(const SmallGemm& g, void* stream);
void bitmap_gemm(const SmallGemm& g, int value_bytes, bool codes, void* stream);
void bitmap_expand(const SmallGemm& g, int value_bytes, void* stream);  // into y [N, K]

// y = x Wᵀ for many tokens, W 2:4 sparse in its canonical storage (semi_structured_linear.cu).
struct SparseGemm {
  const int8_t* x;       // [M, K] codes, with
  const float* x_scale;  // [M]
  const int8_t* weight;  // [N, K / 2]
  const uint8_t* meta;   // [N, K / 8]: nibbles of two ascending places
  const float* scale;    // [N]
  const void* bias;      // [N] or null
  Dtype bias_dtype;
  void* y;  // [M, N]
  Dtype y_dtype;
  int M, N, K;       // K a multiple of kSparseChunk
  int block_tokens;  // 128, or 64 to have more blocks
};
inline constexpr int kSparseChunk = 128;  // inputs: 16 bytes of metadata
void semi_structured_gemm(const SparseGemm& g, void* stream);

// quantize_activation: symmetric int8 codes, one scale a token or group of inputs, as
// llmq/formats/activation.py to the bit.
struct QuantizeRows {
  const void* x;  // [groups, group_size]
  Dtype x_dtype;
  int64_t groups;  // of all tokens
  int group_size;
  int8_t* codes;  // as x
  float* scale;   // [groups]
};
void quantize_rows(const QuantizeRows& q, void* stream);

}  // namespace llmq::cuda
