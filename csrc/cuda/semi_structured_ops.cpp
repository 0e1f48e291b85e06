// semi_structured_linear of CUDA tensors, whose weight stays in its canonical storage.
#include "driver.h"

namespace llmq::cuda {

Tensor semi_structured_linear(const Tensor& given, const Tensor& given_weight,
                              const Tensor& given_meta, const OptionalTensor& weight_scale,
                              const OptionalTensor& bias,
                              std::optional<int64_t> activation_group_size,
                              const OptionalTensor& activation_scale) {
  constexpr const char* kOp = "semi_structured_linear";
  const Device device(given);
  const Tensor x = aligned(given), weight = aligned(given_weight), meta = aligned(given_meta);
  const int64_t N = weight.size(0), K = x.size(x.dim() - 1);
  check(K % kSparseChunk == 0, kOp, "the inputs must be a multiple of 128");
  check(weight.scalar_type() == ScalarType::Char && weight.dim() == 2 && weight.size(1) == K / 2,
        kOp, "weight must be int8 codes [N, K/2]");
  check(meta.scalar_type() == ScalarType::Byte && meta.dim() == 2 && meta.size(0) == N &&
            meta.size(1) == K / 8,
        kOp, "weight_meta must be uint8 [N, K/8]");
  check(weight_scale.has_value() && weight_scale->numel() == N, kOp,
        "weight_scale must be float32 [N, 1]");
  check(activation_group_size == 0 || activation_group_size == K, kOp,
        "inputs must be codes with one scale a token");

  const Tensor y = empty_output(x, N);
  const SmallGemm same = gemm_of(kOp, x, bias, y);
  const Quantized q = quantize(kOp, x, 0, activation_scale, device);
  const SparseGemm g{.x = static_cast<const int8_t*>(q.first.const_data_ptr()),
                     .x_scale = static_cast<const float*>(q.second.const_data_ptr()),
                     .weight = static_cast<const int8_t*>(weight.const_data_ptr()),
                     .meta = static_cast<const uint8_t*>(meta.const_data_ptr()),
                     .scale = scales(kOp, *weight_scale, N),
                     .bias = same.bias,
                     .bias_dtype = same.bias_dtype,
                     .y = same.y,
                     .y_dtype = same.y_dtype,
                     .M = same.M,
                     .N = same.N,
                     .K = same.K,
                     .plan = choose_sparse_plan(same.M, same.N, device.multiprocessors,
                                                device.shared_bytes, semi_structured_has_wgmma())};
  semi_structured_gemm(g, device.stream);
  return y;
}

}  // namespace llmq::cuda
