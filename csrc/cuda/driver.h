// On the way from tensors to a launch: device and stream, rows that begin on 16 bytes, memory.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "ops.h"

#ifndef LLMQ_CUDA_EMULATOR
#include <cuda_runtime_api.h>
// Of libtorch_cuda. Weak, so that a library that was built with CUDA loads beside a torch without.
extern "C" [[gnu::weak]] AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                           void** stream);
#endif

namespace llmq::cuda {

using torch::headeronly::ScalarType;

inline void check(bool condition, const char* op, const std::string& message) {
  if (!condition) throw std::invalid_argument(std::string("llmq.cuda_") + op + ": " + message);
}

#ifdef LLMQ_CUDA_EMULATOR
struct Device {
  explicit Device(const Tensor&) {}
  void* stream = nullptr;
  int multiprocessors = 3, shared_bytes = 227 * 1024;
  void zero(void* memory, size_t bytes) const { std::memset(memory, 0, bytes); }
};
#else
inline void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// Makes the tensor's device current while it lives; `stream` is the one that torch has current.
struct Device {
  explicit Device(const Tensor& tensor) : guard(tensor.get_device()) {
    const int32_t index = tensor.get_device();
    if (aoti_torch_get_current_cuda_stream == nullptr) {
      throw std::runtime_error("llmq: CUDA kernels need a torch that is built with CUDA");
    }
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index));
    check_cuda(
        cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  }
  void zero(void* memory, size_t bytes) const {
    check_cuda(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)));
  }
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
  int multiprocessors = 0, shared_bytes = 0;  // that a block may have
};
#endif

// Contiguous and from a multiple of 16 bytes on: as it is, or copied.
Tensor aligned(const Tensor& tensor);

// Memory of torch's allocator on x's device, which keeps it for the stream until work there is
// done: a graph that captures the call keeps its own.
Tensor empty_on(const Tensor& x, std::initializer_list<int64_t> sizes, ScalarType type);
Tensor empty_output(const Tensor& x, int64_t N);  // [..., N] in x's dtype

Dtype dtype_of(const char* op, const Tensor& tensor);
int64_t tokens_of(const Tensor& x);  // M of x [..., K]

// So many slices of K that all multiprocessors have two blocks, each two chunks at least.
int choose_splits(int64_t blocks, int64_t K, int chunk, int multiprocessors);

using Quantized = std::pair<Tensor, Tensor>;  // codes and scale
// With the scale [1] that is given, or, without one, those of the inputs.
Quantized quantize(const char* op, const Tensor& x, int64_t group_size, const OptionalTensor& given,
                   const Device& device);
void set_codes(const char* op, SmallGemm& g, const Quantized& q);

const float* scales(const char* op, const Tensor& scale, int64_t N);
// What every op shares: sizes, bias and y.
SmallGemm gemm_of(const char* op, const Tensor& x, const OptionalTensor& bias, const Tensor& y);

// Sets splits and workspace of a SmallGemm and calls launcher(g): weights in chunks of so many
// inputs.
template <class Launcher>
void run_small_gemm(const Tensor& x, SmallGemm g, int chunk, const Device& device,
                    const Launcher& launcher) {
  const int64_t blocks = ceil_div(g.N, kBlockOutputs) * ceil_div(g.M, block_tokens(g.M));
  g.splits = choose_splits(blocks, g.K, chunk, device.multiprocessors);
  if (g.splits == 1) {
    launcher(g);
    return;
  }
  const int64_t sums = blocks * g.splits * kBlockOutputs * block_tokens(g.M);
  const Tensor workspace = empty_on(x, {blocks + sums}, ScalarType::Int);
  g.arrivals = static_cast<uint32_t*>(workspace.mutable_data_ptr());
  g.partial = g.arrivals + blocks;
  device.zero(g.arrivals, static_cast<size_t>(blocks) * sizeof(uint32_t));
  launcher(g);
}

}  // namespace llmq::cuda
