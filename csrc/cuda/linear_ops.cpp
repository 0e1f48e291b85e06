// quantize_activation, int8_linear and weight_only_linear of CUDA tensors: tensors to pointers.
#include "driver.h"

namespace llmq::cuda {
namespace {

// The codes of a dense weight, whose rows begin on 16 bytes.
const void* rows_of(const char* op, const Tensor& weight, int64_t K, int64_t bits) {
  check(weight.scalar_type() == ScalarType::Char && weight.dim() == 2 &&
            weight.size(1) == K * bits / 8,
        op, "weight must be int8 codes [N, K] or nibbles [N, K/2]");
  check(K * bits / 8 % 16 == 0, op, "rows of the weight must be a multiple of 16 bytes");
  return weight.const_data_ptr();
}

}  // namespace

std::tuple<Tensor, Tensor> quantize_activation(const Tensor& given, int64_t group_size,
                                               const OptionalTensor& activation_scale) {
  const Device device(given);
  const Tensor x = aligned(given);
  const Quantized q = quantize("quantize_activation", x, group_size, activation_scale, device);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  const Tensor codes = torch::stable::view(q.first, sizes);
  sizes.back() = q.second.size(1);
  return {codes, torch::stable::view(q.second, sizes)};
}

Tensor int8_linear(const Tensor& given, const Tensor& given_weight, const Tensor& weight_scale,
                   const OptionalTensor& bias, int64_t activation_group_size,
                   const OptionalTensor& activation_scale) {
  constexpr const char* kOp = "int8_linear";
  const Device device(given);
  const Tensor x = aligned(given), weight = aligned(given_weight);
  const Tensor y = empty_output(x, weight.size(0));
  SmallGemm g = gemm_of(kOp, x, bias, y);
  g.weight = rows_of(kOp, weight, g.K, 8);
  const Quantized q = quantize(kOp, x, activation_group_size, activation_scale, device);
  set_codes(kOp, g, q);
  g.scale = scales(kOp, weight_scale, g.N);
  run_small_gemm(x, g, chunk_inputs(8), device,
                 [&](const SmallGemm& full) { int8_gemm(full, device.stream); });
  return y;
}

Tensor weight_only_linear(const Tensor& given, const Tensor& given_weight,
                          const Tensor& weight_scale, const OptionalTensor& weight_zero_point,
                          const OptionalTensor& bias, int64_t bits,
                          std::optional<int64_t> activation_group_size) {
  constexpr const char* kOp = "weight_only_linear";
  check(bits == 8 || bits == 4, kOp, "bits must be 8 or 4");
  const bool codes = activation_group_size.has_value();
  check(bits == 4 || !codes, kOp, "inputs of 8-bit weights must stay in floating point");
  const Device device(given);
  const Tensor x = aligned(given), weight = aligned(given_weight);
  const Tensor y = empty_output(x, weight.size(0));
  SmallGemm g = gemm_of(kOp, x, bias, y);
  g.weight = rows_of(kOp, weight, g.K, bits);
  std::optional<Quantized> q;
  if (codes) {
    q = quantize(kOp, x, *activation_group_size, std::nullopt, device);
    set_codes(kOp, g, *q);
  } else {
    g.x = x.const_data_ptr();
    g.x_dtype = dtype_of(kOp, x);
    check(g.x_dtype != Dtype::f32, kOp, "x must be bfloat16 or float16");
  }
  g.scale = scales(kOp, weight_scale, g.N);
  g.groups = static_cast<int>(weight_scale.size(1));
  check(g.groups == 1 || g.K / g.groups % 32 == 0, kOp, "groups must be multiples of 32");
  if (weight_zero_point.has_value()) {
    check(weight_zero_point->is_contiguous(), kOp, "weight_zero_point must be contiguous");
    g.zero_point = static_cast<const int8_t*>(weight_zero_point->const_data_ptr());
  }
  run_small_gemm(x, g, chunk_inputs(static_cast<int>(bits)), device, [&](const SmallGemm& full) {
    weight_only_gemm(full, static_cast<int>(bits), codes, device.stream);
  });
  return y;
}

}  // namespace llmq::cuda
