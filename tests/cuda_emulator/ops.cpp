// The CUDA ops' own driver over emulated kernels, for tensors of the CPU.
#include "../../csrc/cuda/ops.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_IMPL(llmq, CPU, library) {
  library.impl("cuda_quantize_activation", TORCH_BOX(&llmq::cuda::quantize_activation));
  library.impl("cuda_int8_linear", TORCH_BOX(&llmq::cuda::int8_linear));
  library.impl("cuda_weight_only_linear", TORCH_BOX(&llmq::cuda::weight_only_linear));
  library.impl("cuda_bitmap_sparse_linear", TORCH_BOX(&llmq::cuda::bitmap_sparse_linear));
  library.impl("cuda_semi_structured_linear", TORCH_BOX(&llmq::cuda::semi_structured_linear));
  library.impl("cuda_expand_bitmap", TORCH_BOX(&llmq::cuda::expand_bitmap));
}
