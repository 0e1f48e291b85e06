// weight_only_linear for few tokens: y = x (scale · (q − zero_point))ᵀ + bias, q of 8 or 4 bits.
//
// ldmatrix of 16 rows × 32 bytes gives each lane 16 or 32 weights; conversion costs 1 (int8 to f16),
// 2.5 (int8 to bf16), 1.1 or 1.4 (int4) instructions a weight. Scales multiply the float sum of each
// group, not the weights, so that the codes enter mma exactly.
#include "rows.cuh"

namespace llmq::cuda {

void weight_only_gemm(const SmallGemm& g, int bits, void* stream) {
  const bool half = g.x_dtype == Dtype::f16;
  if (bits == 8) {
    half ? launch_small_gemm<Rows<8>, Floats<Half, 8>>(g, stream)
         : launch_small_gemm<Rows<8>, Floats<BFloat16, 8>>(g, stream);
  } else {
    half ? launch_small_gemm<Rows<4>, Floats<Half, 4>>(g, stream)
         : launch_small_gemm<Rows<4>, Floats<BFloat16, 4>>(g, stream);
  }
}

}  // namespace llmq::cuda
