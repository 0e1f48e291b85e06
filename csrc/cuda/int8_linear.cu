// int8_linear for few tokens: y = Σ_groups (dot of codes · x_scale) · weight_scale + bias.
//
// ldmatrix of 16 rows × 32 bytes is the A fragment of one mma m16n8k32: no conversion at all. With
// one scale a token the sums stay int32 to the end, and so exact whatever the number of slices.
// Storage: rows.cuh; tile: small_gemm.cuh. Reading the weights bounds it: shared memory, which
// binds next, allows 3.3 to 3.8 times an H100's bandwidth for up to 8 tokens, 2.0 to 2.7 times for
// 32 (benchmarks/results/static/cuda.json). Not yet measured.
#include "launch_small_gemm.cuh"
#include "rows.cuh"

namespace llmq::cuda {

void int8_gemm(const SmallGemm& g, void* stream) {
  g.x_groups == 1 ? launch_small_gemm<Rows<8>, Codes<false>>(g, stream)
                  : launch_small_gemm<Rows<8>, Codes<true>>(g, stream);
}

}  // namespace llmq::cuda
