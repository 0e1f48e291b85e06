#include "driver.h"

#include <algorithm>

namespace llmq::cuda {

Tensor aligned(const Tensor& tensor) {
  const Tensor rows = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  const bool odd = reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 != 0;
  return odd ? torch::stable::clone(rows) : rows;
}

static Tensor empty_of(const Tensor& x, const std::vector<int64_t>& sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) {
    strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  }
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device_type,
      std::max<int32_t>(x.get_device(), 0), &handle));
  return Tensor(handle);
}

Tensor empty_on(const Tensor& x, std::initializer_list<int64_t> sizes, ScalarType type) {
  return empty_of(x, sizes, type);
}

Tensor empty_output(const Tensor& x, int64_t N) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = N;
  return empty_of(x, sizes, x.scalar_type());
}

Dtype dtype_of(const char* op, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      check(false, op, "floating-point tensors must be float32, bfloat16 or float16");
      return Dtype::f32;
  }
}

int64_t tokens_of(const Tensor& x) {
  const int64_t K = x.size(x.dim() - 1);
  return K == 0 ? 0 : x.numel() / K;
}

int choose_splits(int64_t blocks, int64_t K, int chunk, int multiprocessors) {
  const int64_t chunks = ceil_div(K, chunk);
  const int64_t wanted = ceil_div(2 * multiprocessors, blocks);
  return static_cast<int>(std::clamp<int64_t>(wanted, 1, std::max<int64_t>(chunks / 2, 1)));
}

Quantized quantize(const char* op, const Tensor& x, int64_t group_size, const OptionalTensor& given,
                   const Device& device) {
  const int64_t K = x.size(x.dim() - 1), group = group_size == 0 ? K : group_size;
  check(group > 0 && K % group == 0, op, "the group size must divide K");
  check(!given.has_value() ||
            (group == K && given->numel() == 1 && given->scalar_type() == ScalarType::Float),
        op, "activation_scale must be float32 [1], without groups");
  const int64_t M = tokens_of(x);
  Quantized q{empty_on(x, {M, K}, ScalarType::Char),
              empty_on(x, {M, K / group}, ScalarType::Float)};
  const QuantizeRows rows{
      .x = x.const_data_ptr(),
      .x_dtype = dtype_of(op, x),
      .groups = M * (K / group),
      .group_size = static_cast<int>(group),
      .codes = static_cast<int8_t*>(q.first.mutable_data_ptr()),
      .scale = static_cast<float*>(q.second.mutable_data_ptr()),
      .given = given.has_value() ? static_cast<const float*>(given->const_data_ptr()) : nullptr};
  quantize_rows(rows, device.stream);
  return q;
}

void set_codes(const char* op, SmallGemm& g, const Quantized& q) {
  g.x = q.first.const_data_ptr();
  g.x_scale = static_cast<const float*>(q.second.const_data_ptr());
  g.x_groups = static_cast<int>(q.second.size(1));
  check(g.x_groups == 1 || g.K / g.x_groups % 32 == 0, op, "groups must be multiples of 32");
}

const float* scales(const char* op, const Tensor& scale, int64_t N) {
  check(scale.scalar_type() == ScalarType::Float && scale.dim() == 2 && scale.is_contiguous() &&
            scale.size(0) == N,
        op, "weight_scale must be contiguous float32 [N, groups]");
  return static_cast<const float*>(scale.const_data_ptr());
}

SmallGemm gemm_of(const char* op, const Tensor& x, const OptionalTensor& bias, const Tensor& y) {
  check(!bias.has_value() || bias->is_contiguous(), op, "bias must be contiguous");
  SmallGemm g{};
  g.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  g.bias_dtype = bias.has_value() ? dtype_of(op, *bias) : Dtype::f32;
  g.y = y.mutable_data_ptr();
  g.y_dtype = dtype_of(op, y);
  g.M = static_cast<int>(tokens_of(x));
  g.N = static_cast<int>(y.size(y.dim() - 1));
  g.K = static_cast<int>(x.size(x.dim() - 1));
  g.x_groups = g.groups = 1;
  return g;
}

}  // namespace llmq::cuda
