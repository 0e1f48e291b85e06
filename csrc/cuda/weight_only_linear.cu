// weight_only_linear for few tokens: y = x (scale · (q − zero_point))ᵀ + bias, q of 8 or 4 bits.
//
// ldmatrix of 16 rows × 32 bytes gives each lane 16 or 32 weights; conversion costs 1.25 (int8 to
// f16), 2 (int8 to bf16; 2.5 with a zero point), 1.1 or 1.4 (int4) instructions a weight. Scales
// multiply the float sum of each group, not the weights, so that the codes enter mma exactly.
//
// With x as int8 codes (4 bits alone) y = Σ_groups x_scale · scale · (Σ x q − zero_point · Σ x):
// both sums in int32, the second by an mma with ones, which all outputs of a warp share; 0.4
// instructions a weight make int8 of nibbles.
//
// Storage: rows.cuh; tile: small_gemm.cuh. Reading the weights bounds it, but for 32 tokens of int8
// inputs. Instructions and shared memory allow so many times an H100's bandwidth, by the group
// (benchmarks/results/static/cuda.json); not yet measured:
//
//     weights  inputs             up to 8 tokens      32 tokens
//     int8     f16, bf16             2.34 – 3.37    1.72 – 1.97
//     int4     f16, bf16             1.86 – 2.48    1.12 – 1.26
//     int4     int8                  1.74 – 2.78    0.72 – 1.39
#include "launch_small_gemm.cuh"
#include "rows.cuh"

namespace llmq::cuda {

void weight_only_gemm(const SmallGemm& g, int bits, bool codes, void* stream) {
  const bool half = g.x_dtype == Dtype::f16;
  if (codes) {
    launch_small_gemm<Rows<4>, Codes<true, 4>>(g, stream);
  } else if (bits == 8) {
    half ? launch_small_gemm<Rows<8>, Floats<Half, 8>>(g, stream)
         : launch_small_gemm<Rows<8>, Floats<BFloat16, 8>>(g, stream);
  } else {
    half ? launch_small_gemm<Rows<4>, Floats<Half, 4>>(g, stream)
         : launch_small_gemm<Rows<4>, Floats<BFloat16, 4>>(g, stream);
  }
}

}  // namespace llmq::cuda
