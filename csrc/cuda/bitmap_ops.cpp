// bitmap_sparse_linear of CUDA tensors whose weight stands in bitmap tiles (kernels.h).
#include "driver.h"

namespace llmq::cuda {
namespace {

constexpr const char* kOp = "bitmap_sparse_linear";

void set_tiles(SmallGemm& g, const Tensor& weight, const Tensor& weight_bitmask,
               const Tensor& row_offsets) {
  const int size = static_cast<int>(weight.element_size());
  check(size <= 2, kOp, "values must be int8, bfloat16 or float16");
  const int64_t strips = ceil_div(g.N, 32), chunks = ceil_div(g.K, bitmap_chunk(size));
  check(weight_bitmask.dim() == 4 && weight_bitmask.size(0) == strips &&
            weight_bitmask.size(1) == chunks && weight_bitmask.size(3) == bitmap_mask_bytes(size) &&
            weight_bitmask.is_contiguous(),
        kOp, "weight_bitmask must be of bitmap tiles for these N and K");
  check(row_offsets.scalar_type() == ScalarType::Long && row_offsets.is_contiguous() &&
            row_offsets.numel() == strips * chunks,
        kOp, "row_offsets must be int64 [strips, chunks]");
  g.weight = weight.const_data_ptr();
  g.bitmask = static_cast<const uint8_t*>(weight_bitmask.const_data_ptr());
  g.offsets = static_cast<const int64_t*>(row_offsets.const_data_ptr());
}

}  // namespace

Tensor bitmap_sparse_linear(const Tensor& given, const Tensor& given_weight,
                            const Tensor& given_bitmask, const Tensor& row_offsets,
                            const OptionalTensor& weight_scale, const OptionalTensor& bias,
                            std::optional<int64_t> activation_group_size,
                            const OptionalTensor& activation_scale) {
  const Device device(given);
  const Tensor x = aligned(given), weight = aligned(given_weight);
  const Tensor weight_bitmask = aligned(given_bitmask);
  const int size = static_cast<int>(weight.element_size());
  const int64_t N = weight_scale.has_value() ? weight_scale->size(0) : 32 * weight_bitmask.size(0);
  const Tensor y = empty_output(x, N);
  SmallGemm g = gemm_of(kOp, x, bias, y);
  set_tiles(g, weight, weight_bitmask, row_offsets);
  check((size == 1) == weight_scale.has_value(), kOp, "int8 values, and only they, have a scale");
  if (weight_scale.has_value()) g.scale = scales(kOp, *weight_scale, N);

  std::optional<Quantized> q;
  const bool codes = activation_group_size.has_value();
  check(g.K * (codes ? 1 : 2) % 16 == 0, kOp, "rows of x must be a multiple of 16 bytes");
  if (codes) {
    check(size == 1, kOp, "int8 inputs need int8 values");
    q = quantize(kOp, x, *activation_group_size, activation_scale, device);
    set_codes(kOp, g, *q);
  } else {
    g.x = x.const_data_ptr();
    g.x_dtype = dtype_of(kOp, x);
    check(size == 1 ? g.x_dtype != Dtype::f32 : weight.scalar_type() == x.scalar_type(), kOp,
          "x must be bfloat16 or float16, and as floating-point values are");
  }
  run_small_gemm(x, g, bitmap_chunk(size), device,
                 [&](const SmallGemm& full) { bitmap_gemm(full, size, codes, device.stream); });
  return y;
}

Tensor expand_bitmap(const Tensor& given_weight, const Tensor& given_bitmask,
                     const Tensor& row_offsets, int64_t N, int64_t K) {
  const Device device(given_weight);
  const Tensor weight = aligned(given_weight), weight_bitmask = aligned(given_bitmask);
  const Tensor dense = empty_on(weight, {N, K}, weight.scalar_type());
  SmallGemm g{};
  g.y = dense.mutable_data_ptr();
  g.N = static_cast<int>(N);
  g.K = static_cast<int>(K);
  check(K % 4 == 0, kOp, "K must be a multiple of 4");
  set_tiles(g, weight, weight_bitmask, row_offsets);
  bitmap_expand(g, static_cast<int>(weight.element_size()), device.stream);
  return dense;
}

}  // namespace llmq::cuda
