// The CUDA ops' own driver over emulated kernels, for tensors of the CPU.
#include "../../csrc/cuda/ops.h"

STABLE_TORCH_LIBRARY_IMPL(llmq, CPU, library) { llmq::cuda::register_ops(library); }
