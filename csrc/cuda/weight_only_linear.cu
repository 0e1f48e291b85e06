// weight_only_linear for few tokens: y = x (scale · (q − zero_point))ᵀ + bias, q of 8 or 4 bits.
//
// A 16-byte load is 16 or 32 weights; conversion costs 1 (int8 to f16), 2.5 (int8 to bf16), 1.1 or
// 1.4 (int4) instructions a weight. Scales multiply the float sum of each group, not the weights, so
// that the codes enter mma exactly.
#include "dense_tiles.cuh"

namespace llmq::cuda {

void weight_only_gemm(const SmallGemm& g, int bits, void* stream) {
  const bool half = g.x_dtype == Dtype::f16;
  if (bits == 8) {
    half ? launch_small_gemm<Int8Tiles, Floats<Half>>(g, stream)
         : launch_small_gemm<Int8Tiles, Floats<BFloat16>>(g, stream);
  } else {
    half ? launch_small_gemm<Int4Tiles, Floats<Half>>(g, stream)
         : launch_small_gemm<Int4Tiles, Floats<BFloat16>>(g, stream);
  }
}

}  // namespace llmq::cuda
