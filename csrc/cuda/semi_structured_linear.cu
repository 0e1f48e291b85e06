// semi_structured_linear: y = Σ (codes of x · codes of W, two of every four kept) · x_scale · scale
// + bias, for many tokens.
//
//     storage  canonical: values int8 [N, K/2], metadata [N, K/8], a nibble for 4 inputs; 8 of them
//              are the metadata register of mma.sp as they lie
//     block    one of kSparsePlans, all of K; grid (tokens, outputs)
//     warp     64 outputs × 32, 64 or 96 tokens: 4 × 4, 8 or 12 tiles of mma.sp m16n8k64; or, of
//              sm_90a, 4 warps 64 outputs × 192 tokens by wgmma.sp m64n192k64
//     chunk    128 inputs: 64 bytes of values and 16 of metadata of an output, 128 of a token;
//              kStages of them on their way by cp.async, one barrier a chunk
//
// Outputs are the rows of mma, whose A is the sparse one. Which inputs a step of 64 takes is free:
// step s has 32·s … and 64 + 32·s …, so that one load of 8 bytes gives a lane the metadata of both
// steps. Sums go through shared memory at the end: a thread scales and stores one output, a warp 32
// that lie side by side.
//
// Shared memory bounds it, and behind it L2. An mma of a warp of r × t tiles loads 4/t + 4/r + 1/t
// wavefronts (values, tokens, metadata); wgmma the same of 4 × 24, without going through registers.
// With what the block copies, and the bytes that come from L2:
//
//     block        128 × 64   128 × 128   256 × 128   256 × 192   256 × 192 by wgmma
//     loads            2.25        1.63        1.63        1.42        1.21
//     copies           1.13        0.81        0.56        0.46        0.46
//     wavefronts       3.38        2.44        2.19        1.88        1.67
//     bytes             144         104          72          59          59
//
// of an mma, a cycle a wavefront, where an mma takes tensor cores of an A100 2 cycles, of an H100
// one by the data sheets (and 38 bytes of L2 a cycle and multiprocessor would be 1.5). Not yet
// measured. 96 × 64 a warp would take 1.77, but a register more than there are on some GPUs.
#include "floats.cuh"
#include "kernels.h"
#include "ptx.cuh"

namespace llmq::cuda {
namespace {

constexpr int kSteps = 2;
constexpr int kValueBytes = kSparseChunk / 2, kMetaBytes = kSparseChunk / 8;  // of an output

template <int kPlan>
struct Plan {
  static constexpr SparsePlan kOf = kSparsePlans[kPlan];
  static constexpr bool kWgmma = kOf.wgmma;
  static constexpr int kRowTiles = kOf.row_tiles, kTokenTiles = kOf.token_tiles;
  static constexpr int kWarpOutputs = 16 * kRowTiles, kWarpTokens = 8 * kTokenTiles;
  static constexpr int kTokenWarps = kOf.token_warps, kThreads = kOf.threads();
  static constexpr int kOutputs = kOf.outputs(), kTokens = kOf.tokens();
  static constexpr int kMeta = kOutputs * kValueBytes, kX = kMeta + kOutputs * kMetaBytes;
  static constexpr int kStageBytes = kOf.chunk_bytes(), kStages = kOf.stages;
  static_assert(kStageBytes == kX + kTokens * kSparseChunk);
  static_assert(kOutputs % kWarpOutputs == 0 && kTokens == kTokenWarps * kWarpTokens);
  static_assert(kThreads == (kWgmma ? 2 : 1) * kOutputs);
  // Sums are [tokens, outputs]; 2 rows on are 8 banks on, where 4 lanes' tokens and 8 outputs fit
  // in.
  static constexpr int kSumRow = kOutputs + 4;
  static_assert(kWarpTokens * kSumRow * 4 <= kStages * kStageBytes);
  // wgmma wants a step's inputs side by side: units stand in the order 0, 2, 1, 3, of tokens in
  // twos.
  LLMQ_PTX static int value_unit(int unit) { return kWgmma ? unit % 2 * 2 + unit / 2 : unit; }
  LLMQ_PTX static int token_unit(int unit) { return value_unit(unit / 2) * 2 + unit % 2; }
};

// Where a unit of 16 bytes stands in a stage, so that neither copies nor loads meet a bank twice.
// The same 16 rows on; and the next unit, or two, is one bit (the XORs below).
LLMQ_PTX int value_at(int row, int unit) { return row * kValueBytes + (unit ^ row / 2 % 4) * 16; }
LLMQ_PTX int meta_at(int row) { return (row ^ row / 8 % 2 * 4) * kMetaBytes; }
LLMQ_PTX int token_at(int token, int unit) {
  return token * kSparseChunk + (unit ^ token % 8) * 16;
}

// Copies a chunk: a thread one unit of every kRows-th output and every kTokenRows-th token, and the
// metadata of one output. Past N and M come zeros; metadata, of which zeros would not be valid,
// repeats the last. Where it copies from and to is found anew each time: sums need the registers.
template <class P>
LLMQ_PTX void copy_chunk(const SparseGemm& g, int n0, int m0, int chunk, unsigned char* stage) {
  constexpr int kUnits = kValueBytes / 16, kRows = P::kThreads / kUnits;
  constexpr int kTokenUnits = kSparseChunk / 16, kTokenRows = P::kThreads / kTokenUnits;
  static_assert(P::kOutputs % kRows == 0 && P::kTokens % kTokenRows == 0);
  static_assert(kRows % 8 == 0 && kTokenRows % 8 == 0);
  const int thread = ptx::opaque(static_cast<int>(threadIdx.x));

  const int row = thread / kUnits, rows = g.N - n0 - row;  // that there are from the first on
  const int8_t* weight = g.weight + int64_t{n0 + row} * (g.K / 2) + thread % kUnits * 16;
  weight += chunk * kValueBytes;
  unsigned char* const values = stage + value_at(row, P::value_unit(thread % kUnits));
#pragma unroll
  for (int i = 0; i < P::kOutputs / kRows; ++i) {
    ptx::cp_async_16(values + i * kRows * kValueBytes, weight + int64_t{i * kRows} * (g.K / 2),
                     i * kRows < rows ? 16 : 0);
  }
  if (P::kThreads == P::kOutputs || thread < P::kOutputs) {
    const uint8_t* const meta = g.meta + int64_t{ptx::min(n0 + thread, g.N - 1)} * (g.K / 8);
    ptx::cp_async_16(stage + P::kMeta + meta_at(thread), meta + chunk * kMetaBytes, 16);
  }
  const int token = thread / kTokenUnits, tokens = g.M - m0 - token;
  const int8_t* x = g.x + int64_t{m0 + token} * g.K + thread % kTokenUnits * 16;
  x += chunk * kSparseChunk;
  unsigned char* const to = stage + P::kX + token_at(token, P::token_unit(thread % kTokenUnits));
#pragma unroll
  for (int i = 0; i < P::kTokens / kTokenRows; ++i) {
    ptx::cp_async_16(to + i * kTokenRows * kSparseChunk, x + int64_t{i * kTokenRows} * g.K,
                     i * kTokenRows < tokens ? 16 : 0);
  }
}

// Copies a chunk to its stage as a group of its own; past K an empty one, as waits count groups.
template <class P>
LLMQ_PTX void copy_group(const SparseGemm& g, int n0, int m0, int chunk, unsigned char* stages) {
  if (chunk * kSparseChunk < g.K) {
    copy_chunk<P>(g, n0, m0, chunk, stages + chunk % P::kStages * P::kStageBytes);
  }
  ptx::cp_async_commit();
}

// A thread, and the first output and token of its warp. Found anew after the loop, too.
template <class P>
struct Place {
  int thread = ptx::opaque(static_cast<int>(threadIdx.x)), lane = thread % 32;
  int row = thread / 32 / P::kTokenWarps * P::kWarpOutputs;
  int token = thread / 32 % P::kTokenWarps * P::kWarpTokens;
};

// Puts the sums of a tile of mma into [tokens, outputs] in shared memory.
template <class P>
LLMQ_PTX void put_sums(int32_t* tile, int t, int first, int lane, const int32_t (&sums)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = t * 8 + lane % 4 * 2 + i % 2, row = first + lane / 4 + i / 2 * 8;
    ptx::st_shared(tile + token * P::kSumRow + row, sums[i]);
  }
}

// Scales and stores the sums of P::kWarpTokens tokens: a thread one output.
template <class P>
LLMQ_PTX void store_sums(const SparseGemm& g, const int32_t* tile, int n0, int first, int thread) {
  const int row = thread % P::kOutputs, n = n0 + row,
            tokens = ptx::min(P::kWarpTokens, g.M - first);
  if (n >= g.N) return;
  const float scale = ptx::ld_global(g.scale + n);
  const float bias = g.bias == nullptr ? 0 : load_float(g.bias, g.bias_dtype, n);
#pragma unroll 4
  for (int token = thread / P::kOutputs; token < tokens; token += P::kThreads / P::kOutputs) {
    const int64_t m = first + token;
    float y = static_cast<float>(ptx::ld_shared(tile + token * P::kSumRow + row));
    y = ptx::mul(ptx::mul(y, ptx::ld_global(g.x_scale + m)), scale);
    if (g.bias != nullptr) y = ptx::add(y, bias);
    store_float(g.y, g.y_dtype, m * g.N + n, y);
  }
}

template <int kPlan>
__global__ void __launch_bounds__(Plan<kPlan>::kThreads, 256 / Plan<kPlan>::kThreads)
    sparse_gemm(const SparseGemm g) {
  using P = Plan<kPlan>;
  constexpr int kStages = P::kStages, kRowTiles = P::kRowTiles, kTokenTiles = P::kTokenTiles;
  const int n0 = static_cast<int>(blockIdx.y) * P::kOutputs;
  const int m0 = static_cast<int>(blockIdx.x) * P::kTokens;
  unsigned char* const stages = ptx::shared_memory();

  const auto copy = [&](int chunk) { copy_group<P>(g, n0, m0, chunk, stages); };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) copy(i);

  // What this lane loads, of the first tile and step.
  const Place<P> in;
  const int lane = in.lane;
  const int a_at = value_at(in.row + lane % 16, lane / 16 * 2);
  const int b_at = P::kX + token_at(in.token + lane % 8, lane / 8 % 2 + lane / 16 * 4);
  const int e_at = P::kMeta + meta_at(in.row + lane / 4 + lane % 2 * 8) + lane % 4 / 2 * 8;
  int32_t sums[kRowTiles][kTokenTiles][4] = {};
  for (int chunk = 0; chunk * kSparseChunk < g.K; ++chunk) {
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

  // The tokens of one column of warps after another: those of all would not fit.
  auto* const tile = reinterpret_cast<int32_t*>(stages);
  const Place<P> out;
#pragma unroll 1
  for (int column = 0; column < P::kTokenWarps; ++column) {
    ptx::barrier();  // the stages, or the sums of the column before, have been read
    if (out.token == column * P::kWarpTokens) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) {
          put_sums<P>(tile, t, out.row + r * 16, out.lane, sums[r][t]);
        }
      }
    }
    ptx::barrier();
    store_sums<P>(g, tile, n0, m0 + column * P::kWarpTokens, out.thread);
  }
}

// The same by wgmma: warpgroups of 4 warps take 64 outputs each and read the tokens once for all
// four. A chunk is waited for before the metadata of the next may come into registers; what is
// copied meanwhile hides that. Code for other GPUs is empty, and its launch bounds tell.
template <int kPlan>
__global__ void __launch_bounds__(ptx::kHasWgmma ? Plan<kPlan>::kThreads : 32, 1)
    sparse_wgmma(const SparseGemm g) {
  using P = Plan<kPlan>;
  if constexpr (ptx::kHasWgmma) {
    constexpr int kStages = P::kStages;
    static_assert(P::kX % 1024 == 0 && P::kStageBytes % 1024 == 0 && P::kTokenWarps == 1);
    const int n0 = static_cast<int>(blockIdx.y) * P::kOutputs;
    const int m0 = static_cast<int>(blockIdx.x) * P::kTokens;
    unsigned char* const stages = ptx::shared_memory();

    const auto copy = [&](int chunk) { copy_group<P>(g, n0, m0, chunk, stages); };
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) copy(i);

    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    const int group_row = thread / 128 * P::kWarpOutputs, row = group_row + thread / 32 % 4 * 16;
    const int e_at = P::kMeta + meta_at(row + lane / 4 + lane % 2 * 8) + lane % 4 / 2 * 8;
    int32_t sums[4 * P::kTokenTiles] = {};
    for (int chunk = 0; chunk * kSparseChunk < g.K; ++chunk) {
      ptx::cp_async_wait<kStages - 2>();
      ptx::fence_proxy_async();
      ptx::barrier();  // the chunk is there for all, and all are done with the one before
      const unsigned char* const stage = stages + chunk % kStages * P::kStageBytes;
      const Words2 meta = ptx::ld_shared(reinterpret_cast<const Words2*>(stage + e_at));
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const unsigned char* const values = stage + group_row * kValueBytes;
        ptx::wgmma_sp(sums, ptx::wgmma_matrix<kValueBytes>(values + step * kValueBytes / kSteps),
                      ptx::wgmma_matrix<kSparseChunk>(stage + P::kX + step * kSparseChunk / kSteps),
                      meta.word[step]);
      }
      ptx::wgmma_commit();
      copy(chunk + kStages - 1);
      ptx::wgmma_wait<0>();
    }
    ptx::cp_async_wait<0>();
    ptx::barrier();  // the stages have been read

    auto* const tile = reinterpret_cast<int32_t*>(stages);
#pragma unroll
    for (int t = 0; t < P::kTokenTiles; ++t) {
      const int32_t four[4] = {sums[4 * t], sums[4 * t + 1], sums[4 * t + 2], sums[4 * t + 3]};
      put_sums<P>(tile, t, row, lane, four);
    }
    ptx::barrier();
    store_sums<P>(g, tile, n0, m0, thread);
  }
}

template <int kPlan>
void launch_plan(const SparseGemm& g, void* stream) {
  if (g.plan != kPlan) {
    if constexpr (kPlan + 1 < std::size(kSparsePlans)) launch_plan<kPlan + 1>(g, stream);
    return;
  }
  constexpr SparsePlan plan = kSparsePlans[kPlan];
  const Launch grid{static_cast<unsigned>(ceil_div(g.M, plan.tokens())),
                    static_cast<unsigned>(ceil_div(g.N, plan.outputs())),
                    1,
                    static_cast<unsigned>(plan.threads()),
                    static_cast<size_t>(plan.bytes()),
                    stream};
  if constexpr (plan.wgmma) {
    launch(sparse_wgmma<kPlan>, grid, g);
  } else {
    launch(sparse_gemm<kPlan>, grid, g);
  }
}

}  // namespace

void semi_structured_gemm(const SparseGemm& g, void* stream) { launch_plan<0>(g, stream); }

bool semi_structured_has_wgmma() {
  constexpr int kPlan = static_cast<int>(std::size(kSparsePlans)) - 1;
  static_assert(kSparsePlans[kPlan].wgmma);
  return max_threads(sparse_wgmma<kPlan>) >= kSparsePlans[kPlan].threads();
}

}  // namespace llmq::cuda
