// The native CPU ops, one driver file each; schemas and meanings are in llmq/ops.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace llmq {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;

std::tuple<Tensor, Tensor> quantize_activation(const Tensor& x, int64_t group_size,
                                               const OptionalTensor& activation_scale);

Tensor int8_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                   const OptionalTensor& bias, int64_t activation_group_size,
                   const OptionalTensor& activation_scale);

Tensor weight_only_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                          const OptionalTensor& weight_zero_point, const OptionalTensor& bias,
                          int64_t bits, std::optional<int64_t> activation_group_size);

Tensor codebook_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_codebook,
                       const Tensor& weight_scale, const OptionalTensor& bias, int64_t bits);

Tensor bitmap_sparse_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_bitmask,
                            const Tensor& row_offsets, const OptionalTensor& weight_scale,
                            const OptionalTensor& bias,
                            std::optional<int64_t> activation_group_size,
                            const OptionalTensor& activation_scale);

Tensor decoder_layer(const Tensor& x, const std::vector<Tensor>& norms, const Tensor& cos,
                     const Tensor& sin, const Tensor& keys, const Tensor& values,
                     const OptionalTensor& mask, const std::vector<Tensor>& weights,
                     const std::vector<Tensor>& weight_scales,
                     const std::vector<Tensor>& weight_zero_points,
                     const std::vector<Tensor>& biases, const std::vector<int64_t>& bits,
                     const std::vector<int64_t>& activation_groups, int64_t start, double eps,
                     double scaling);

Tensor pack_panels(const Tensor& weight, int64_t bits);
Tensor unpack_panels(const Tensor& packed, int64_t bits, int64_t N, int64_t K);

Tensors3 pack_bitmap_panels(const Tensor& weight, const Tensor& weight_bitmask,
                            const Tensor& row_offsets, int64_t K);
Tensors3 unpack_bitmap_panels(const Tensor& weight, const Tensor& weight_bitmask,
                              const Tensor& panel_offsets, int64_t N, int64_t K);

std::string cpu_isa();
void set_cpu_isa(std::string isa);

}  // namespace llmq
