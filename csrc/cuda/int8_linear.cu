// int8_linear for few tokens: y = Σ_groups (dot of codes · x_scale) · weight_scale + bias.
//
// A 16-byte load of tiles8 is the A fragment of one mma m16n8k32: no conversion at all. With one
// scale a token the sums stay int32 to the end, and so exact whatever the number of slices.
#include "dense_tiles.cuh"

namespace llmq::cuda {

void int8_gemm(const SmallGemm& g, void* stream) {
  g.x_groups == 1 ? launch_small_gemm<Int8Tiles, Codes<false>>(g, stream)
                  : launch_small_gemm<Int8Tiles, Codes<true>>(g, stream);
}

}  // namespace llmq::cuda
