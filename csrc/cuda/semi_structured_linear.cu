// semi_structured_linear: y = Σ (codes of x · codes of W, two of every four kept) · x_scale · scale
// + bias, for many tokens.
//
//     storage  canonical: values int8 [N, K/2], metadata [N, K/8], a nibble for 4 inputs; 8 of them
//              are the metadata register of mma.sp as they lie
//     block    4 warps · 128 outputs × kTokens tokens, all of K; grid (tokens, outputs)
//     warp     64 outputs × kTokens/2 tokens: 4 × kTokens/16 tiles of mma.sp m16n8k64
//     chunk    128 inputs: 64 bytes of values and 16 of metadata of an output, 128 of a token;
//              kStages of them on their way by cp.async, one barrier a chunk
//
// Outputs are the rows of mma.sp, whose A is the sparse one. Which inputs a step of 64 takes is free:
// step s has 32·s … and 64 + 32·s …, so that one load of 8 bytes gives a lane the metadata of both
// steps. Sums go through shared memory at the end: a thread scales and stores one output, a warp 32
// that lie side by side. Shared memory bounds it: a warp's chunk of 64 mma, with 128 tokens, takes 104
// wavefronts to load and 52 to copy, 2.4 cycles an mma, where tensor cores of an A100 would take 2 and
// of an H100 one. Not yet measured.
#include "floats.cuh"
#include "kernels.h"
#include "ptx.cuh"

namespace llmq::cuda {
namespace {

constexpr int kThreads = 128, kSteps = 2, kRowTiles = 4;
constexpr int kWarpOutputs = 16 * kRowTiles;
constexpr int kValueBytes = kSparseChunk / 2, kMetaBytes = kSparseChunk / 8;  // of an output
static_assert(kThreads == kBlockOutputs && kBlockOutputs == 2 * kWarpOutputs);

template <int kTokens>
struct Plan {
  static constexpr int kTokenTiles = kTokens / 16;  // of 8, a warp
  static constexpr int kMeta = kBlockOutputs * kValueBytes, kX = kMeta + kBlockOutputs * kMetaBytes;
  static constexpr int kStageBytes = kX + kTokens * kSparseChunk;
  static constexpr int kStages = kTokens == 64 ? 4 : 3;
  static constexpr int kBytes = kStages * kStageBytes;
  // Sums are [tokens, outputs]; 2 rows on are 8 banks on, where 4 lanes' tokens and 8 outputs fit in.
  static constexpr int kSumRow = kBlockOutputs + 4;
  static_assert(kTokens * kSumRow * 4 <= kBytes && kBytes <= 99 * 1024);
};

// Where a unit of 16 bytes stands in a stage, so that neither copies nor loads meet a bank twice. The
// same 16 rows on; and the next unit, or two, is one bit (the XORs below).
LLMQ_PTX int value_at(int row, int unit) { return row * kValueBytes + (unit ^ row / 2 % 4) * 16; }
LLMQ_PTX int meta_at(int row) { return (row ^ row / 8 % 2 * 4) * kMetaBytes; }
LLMQ_PTX int token_at(int token, int unit) {
  return token * kSparseChunk + (unit ^ token % 8) * 16;
}

LLMQ_PTX int least(int a, int b) { return a < b ? a : b; }

// Copies chunks: this thread one unit of every 32nd output and every 16th token, and the metadata of
// one output. Past N and M come zeros; metadata, of which zeros would not be valid, repeats the last.
template <int kTokens>
struct Copier {
  static constexpr int kUnits = kValueBytes / 16, kRows = kThreads / kUnits;
  static constexpr int kTokenUnits = kSparseChunk / 16, kTokenRows = kThreads / kTokenUnits;
  const int8_t *weight, *x;
  const uint8_t* meta;
  int K, rows, tokens;  // that there are from this thread's first
  int weight_to, x_to;

  LLMQ_PTX Copier(const SparseGemm& g, int n0, int m0, int thread)
      : K(g.K),
        rows(g.N - n0 - thread / kUnits),
        tokens(g.M - m0 - thread / kTokenUnits),
        weight_to(value_at(thread / kUnits, thread % kUnits)),
        x_to(Plan<kTokens>::kX + token_at(thread / kTokenUnits, thread % kTokenUnits)) {
    const int64_t n = n0 + (rows > 0 ? thread / kUnits : 0);
    const int64_t m = m0 + (tokens > 0 ? thread / kTokenUnits : 0);
    const int64_t last = least(n0 + thread, g.N - 1);
    weight = g.weight + n * (K / 2) + thread % kUnits * 16;
    x = g.x + m * K + thread % kTokenUnits * 16;
    meta = g.meta + last * (K / 8);
  }

  LLMQ_PTX void copy(int chunk, unsigned char* stage, int thread) const {
    using P = Plan<kTokens>;
#pragma unroll
    for (int i = 0; i < kBlockOutputs / kRows; ++i) {
      const bool there = i * kRows < rows;
      const int8_t* const from = weight + chunk * kValueBytes;
      ptx::cp_async_16(stage + weight_to + i * kRows * kValueBytes,
                       there ? from + static_cast<int64_t>(i * kRows) * (K / 2) : from,
                       there ? 16 : 0);
    }
    ptx::cp_async_16(stage + P::kMeta + meta_at(thread), meta + chunk * kMetaBytes, 16);
#pragma unroll
    for (int i = 0; i < kTokens / kTokenRows; ++i) {
      const bool there = i * kTokenRows < tokens;
      const int8_t* const from = x + chunk * kSparseChunk;
      ptx::cp_async_16(stage + x_to + i * kTokenRows * kSparseChunk,
                       there ? from + static_cast<int64_t>(i * kTokenRows) * K : from,
                       there ? 16 : 0);
    }
  }
};

template <int kTokens>
__global__ void __launch_bounds__(kThreads, 2) sparse_gemm(const SparseGemm g) {
  using P = Plan<kTokens>;
  constexpr int kStages = P::kStages, kTokenTiles = P::kTokenTiles;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int n0 = static_cast<int>(blockIdx.y) * kBlockOutputs;
  const int m0 = static_cast<int>(blockIdx.x) * kTokens;
  const int row0 = warp / 2 * kWarpOutputs, token0 = warp % 2 * (kTokens / 2);
  const int chunks = g.K / kSparseChunk;
  unsigned char* const stages = ptx::shared_memory();
  const Copier<kTokens> copier(g, n0, m0, thread);

  const auto copy = [&](int chunk) {
    if (chunk < chunks) {
      copier.copy(chunk, stages + chunk % kStages * P::kStageBytes, thread);
    }
    ptx::cp_async_commit();  // also when empty: waits count groups
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) copy(i);

  // What this lane loads, of the first tile and step.
  const int a_at = value_at(row0 + lane % 16, lane / 16 * 2);
  const int b_at = P::kX + token_at(token0 + lane % 8, lane / 8 % 2 + lane / 16 * 4);
  const int e_at = P::kMeta + meta_at(row0 + lane / 4 + lane % 2 * 8) + lane % 4 / 2 * 8;
  int32_t sums[kRowTiles][kTokenTiles][4] = {};
  for (int chunk = 0; chunk < chunks; ++chunk) {
    ptx::cp_async_wait<kStages - 2>();
    ptx::barrier();  // the chunk is there for all, and all have read the one before
    copy(chunk + kStages - 1);
    const unsigned char* const stage = stages + chunk % kStages * P::kStageBytes;
    Words2 meta[kRowTiles];  // lane 4·i + j: of row i + 8·(j % 2), half j / 2 of both steps
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      meta[r] = ptx::ld_shared(reinterpret_cast<const Words2*>(stage + e_at + r * 16 * kMetaBytes));
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        ptx::ldmatrix_x4(a[r], stage + (a_at ^ step * 16) + r * 16 * kValueBytes);
      }
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, stage + (b_at ^ step * 32) + t * 8 * kSparseChunk);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          ptx::mma_sp(sums[r][t], a[r], b, meta[r].word[step]);
        }
      }
    }
  }
  ptx::cp_async_wait<0>();
  ptx::barrier();  // the stages have been read

  auto* const tile = reinterpret_cast<int32_t*>(stages);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = token0 + t * 8 + lane % 4 * 2 + i % 2;
        const int row = row0 + r * 16 + lane / 4 + i / 2 * 8;
        ptx::st_shared(tile + token * P::kSumRow + row, sums[r][t][i]);
      }
    }
  }
  ptx::barrier();
  const int n = n0 + thread, tokens = least(kTokens, g.M - m0);
  if (n >= g.N) return;
  const float scale = ptx::ld_global(g.scale + n);
  const float bias = g.bias == nullptr ? 0 : load_float(g.bias, g.bias_dtype, n);
#pragma unroll 4
  for (int token = 0; token < tokens; ++token) {
    const int64_t m = m0 + token;
    float y = static_cast<float>(ptx::ld_shared(tile + token * P::kSumRow + thread));
    y = ptx::mul(ptx::mul(y, ptx::ld_global(g.x_scale + m)), scale);
    if (g.bias != nullptr) y = ptx::add(y, bias);
    store_float(g.y, g.y_dtype, m * g.N + n, y);
  }
}

template <int kTokens>
void launch_tokens(const SparseGemm& g, void* stream) {
  const Launch grid{static_cast<unsigned>(ceil_div(g.M, kTokens)),
                    static_cast<unsigned>(ceil_div(g.N, kBlockOutputs)),
                    1,
                    kThreads,
                    Plan<kTokens>::kBytes,
                    stream};
  launch(sparse_gemm<kTokens>, grid, g);
}

}  // namespace

void semi_structured_gemm(const SparseGemm& g, void* stream) {
  g.block_tokens == 64 ? launch_tokens<64>(g, stream) : launch_tokens<128>(g, stream);
}

}  // namespace llmq::cuda
