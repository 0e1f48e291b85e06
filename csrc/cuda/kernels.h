// The contract of every CUDA kernel: what drivers (plain C++, which knows tensors) and .cu share.
//
// A launcher gets device pointers to checked, sized memory and a stream; it neither allocates nor
// checks nor waits. M tokens, N outputs, K inputs; strides in elements.
#pragma once

#include <cstdint>
#include <iterator>

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

// Bitmap tiles hold a sparse weight in strips of 32 outputs and chunks of bitmap_chunk inputs
// (llmq/formats/bitmap_tiles.py packs and unpacks them, bitmap_tiles.cuh says what lanes make of
// them):
//
//     bitmask  [strips, chunks, 1, bytes], each of them
//              uint16 [8 runs, 2]           a run's first value, and the units of 16 bytes that it
//                                           and 12 bytes behind it touch: at most 33, the last 34
//              uint32 [32 lanes, chunk/32]  masks
//     weight   8 runs of values from offsets[strip, chunk] on, which is on 16 bytes; behind all,
//              16 bytes more
inline constexpr int kBitmapHeader = 32;
constexpr int bitmap_chunk(int value_bytes) { return 128 / value_bytes; }
constexpr int bitmap_mask_bytes(int value_bytes) {
  return kBitmapHeader + 4 * bitmap_chunk(value_bytes);
}

// Of inputs as they are, or with `codes` (4 bits alone) as int8.
void weight_only_gemm(const SmallGemm& g, int bits, bool codes, void* stream);
void int8_gemm(const SmallGemm& g, void* stream);
void bitmap_gemm(const SmallGemm& g, int value_bytes, bool codes, void* stream);
void bitmap_expand(const SmallGemm& g, int value_bytes, void* stream);  // into y [N, K]

inline constexpr int kSparseChunk = 128;  // inputs: 64 bytes of values, 16 of metadata of an output

// How the 2:4 kernel shares out its work: a block has row_warps × token_warps warps, or warpgroups
// of 4 where they multiply with wgmma, each of row_tiles × token_tiles tiles of 16 outputs and 8
// tokens; and so many chunks in shared memory.
struct SparsePlan {
  int row_tiles, token_tiles, row_warps, token_warps, stages;
  bool wgmma;

  constexpr int outputs() const { return row_warps * row_tiles * 16; }
  constexpr int tokens() const { return token_warps * token_tiles * 8; }
  constexpr int threads() const { return row_warps * token_warps * (wgmma ? 128 : 32); }
  constexpr int chunk_bytes() const {
    return outputs() * (kSparseChunk / 2 + kSparseChunk / 8) + tokens() * kSparseChunk;
  }
  constexpr int bytes() const { return stages * chunk_bytes(); }
  // Cycles that shared memory takes for a chunk, 128 bytes each: what comes in, and what warps
  // load, the tokens once a row of them and values and metadata once a column.
  constexpr int wavefronts() const {
    const int of_outputs = outputs() * (kSparseChunk / 2 + kSparseChunk / 8);
    const int of_tokens = tokens() * kSparseChunk;
    return (of_outputs * (1 + token_warps) + of_tokens * (1 + row_warps)) / 128;
  }
};
inline constexpr SparsePlan kSparsePlans[] = {
    {4, 4, 2, 2, 4, false},   // 128 outputs × 64 tokens
    {4, 8, 2, 2, 3, false},   // 128 × 128
    {4, 8, 4, 2, 2, false},   // 256 × 128, in 99 KB
    {4, 8, 4, 2, 3, false},   // 256 × 128
    {4, 12, 4, 2, 3, false},  // 256 × 192
    {4, 24, 4, 1, 5, true},   // 256 × 192
};

// The plan with which the multiprocessor that has most to do is done first, if shared memory is
// what it waits for; of equal ones the last.
constexpr int choose_sparse_plan(int64_t M, int64_t N, int multiprocessors, int shared_bytes,
                                 bool wgmma) {
  int best = 0;
  int64_t least = INT64_MAX;
  for (int i = 0; i < static_cast<int>(std::size(kSparsePlans)); ++i) {
    const SparsePlan& plan = kSparsePlans[i];
    const int64_t blocks = ceil_div(N, plan.outputs()) * ceil_div(M, plan.tokens());
    const int64_t cycles = ceil_div(blocks, multiprocessors) * plan.wavefronts();
    if (plan.bytes() <= shared_bytes && (wgmma || !plan.wgmma) && cycles <= least) {
      best = i;
      least = cycles;
    }
  }
  return best;
}

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
  int M, N, K;  // K a multiple of kSparseChunk
  int plan;     // of kSparsePlans
};
void semi_structured_gemm(const SparseGemm& g, void* stream);
bool semi_structured_has_wgmma();  // of the current device, and compiled for it

// quantize_activation: symmetric int8 codes, one scale a token or group of inputs, or a given one
// for all, as llmq/formats/activation.py to the bit.
struct QuantizeRows {
  const void* x;  // [groups, group_size]
  Dtype x_dtype;
  int64_t groups;  // of all tokens
  int group_size;
  int8_t* codes;       // as x
  float* scale;        // [groups]
  const float* given;  // [1] the scale of all; null: from the inputs
};
void quantize_rows(const QuantizeRows& q, void* stream);

}  // namespace llmq::cuda
