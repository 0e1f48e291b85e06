// The native CUDA ops; schemas and meanings are in llmq/ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace llmq::cuda {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> quantize_activation(const Tensor& x, int64_t group_size,
                                               const OptionalTensor& activation_scale);

Tensor int8_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                   const OptionalTensor& bias, int64_t activation_group_size,
                   const OptionalTensor& activation_scale);

Tensor weight_only_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                          const OptionalTensor& weight_zero_point, const OptionalTensor& bias,
                          int64_t bits, std::optional<int64_t> activation_group_size);

Tensor semi_structured_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_meta,
                              const OptionalTensor& weight_scale, const OptionalTensor& bias,
                              std::optional<int64_t> activation_group_size,
                              const OptionalTensor& activation_scale);

Tensor bitmap_sparse_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_bitmask,
                            const Tensor& row_offsets, const OptionalTensor& weight_scale,
                            const OptionalTensor& bias,
                            std::optional<int64_t> activation_group_size,
                            const OptionalTensor& activation_scale);
Tensor expand_bitmap(const Tensor& weight, const Tensor& weight_bitmask, const Tensor& row_offsets,
                     int64_t N, int64_t K);

// Registers them all: for GPUs, or for the CPU where kernels are emulated.
template <class Library>
void register_ops(Library& library) {
  library.impl("cuda_quantize_activation", TORCH_BOX(&quantize_activation));
  library.impl("cuda_int8_linear", TORCH_BOX(&int8_linear));
  library.impl("cuda_weight_only_linear", TORCH_BOX(&weight_only_linear));
  library.impl("cuda_bitmap_sparse_linear", TORCH_BOX(&bitmap_sparse_linear));
  library.impl("cuda_semi_structured_linear", TORCH_BOX(&semi_structured_linear));
  library.impl("cuda_expand_bitmap", TORCH_BOX(&expand_bitmap));
}

}  // namespace llmq::cuda
