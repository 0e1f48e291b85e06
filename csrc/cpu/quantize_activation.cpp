// quantize_activation: x [..., K] → codes int8 [..., K] and scale float32 [..., K / group_size].
#include "dispatch.h"
#include "driver.h"

namespace llmq {

std::tuple<Tensor, Tensor> quantize_activation(const Tensor& x, int64_t group_size,
                                               const OptionalTensor& activation_scale) {
  constexpr const char* op = "quantize_activation";
  const TensorRows rows = rows_of(op, x);
  const int64_t K = rows.K;
  check_group(op, group_size, K);
  const float* const given = given_scale(op, activation_scale, group_size, K);
  const int64_t group = group_size == 0 ? K : group_size;
  const int64_t groups = group == 0 || group_size == 0 ? 1 : K / group;

  int64_t sizes[kMaxDims];
  const int64_t dim = x.dim();
  for (int64_t i = 0; i < dim; ++i) sizes[i] = x.size(i);
  const Tensor codes = empty(sizes, dim, ScalarType::Char);
  sizes[dim - 1] = groups;
  const Tensor scale = empty(sizes, dim, ScalarType::Float);
  auto* code_data = static_cast<int8_t*>(codes.mutable_data_ptr());
  auto* scale_data = static_cast<float*>(scale.mutable_data_ptr());

  announce(op, rows.M, groups, K);
  QuantizeRowsFn* const kernel = quantize_rows();
  parallel_rows(rows.M, K, [&](int64_t begin, int64_t end) {
    kernel({rows.row(begin), K, rows.dtype, end - begin, K, group, code_data + begin * K, K, K,
            scale_data + begin * groups, nullptr, given});
  });
  return {codes, scale};
}

}  // namespace llmq
