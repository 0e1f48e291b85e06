// weight_only_linear: w = (q − zero_point) · scale[n, k / group], 8 or 4 bits; x as floats, or
// quantized to int8. Where the instruction set can, floats too are multiplied as int8 digits.
#include <algorithm>
#include <optional>

#include "dispatch.h"
#include "driver.h"
#include "tiles.h"

namespace llmq {
namespace {

constexpr const char* kOp = "weight_only_linear";

// 255 · 127 · 2^14 < 2^29: the int32 dot of a segment of that many inputs cannot overflow.
constexpr int64_t kLongestSegment = 1 << 14;

// A panel with its scales and zero points turned into Slot::panel of this thread.
struct Panel {
  const uint8_t* weight;
  const float* scale;
  const int32_t* zero;
};

Panel prepare(const WeightOnly& w, int64_t panel) {
  float* const scale = scratch<float>(Slot::panel, 2 * w.groups * kPanel);
  auto* const zero = reinterpret_cast<int32_t*>(scale + w.groups * kPanel);
  const int64_t first = panel * kPanel;
  const float* const source = w.scale + first * w.groups;
  panel_scales()({.scale = w.in_panels ? nullptr : source,
                  .zero_point = w.zero_point == nullptr ? nullptr : w.zero_point + first * w.groups,
                  .lanes = std::min(kPanel, w.N - first),
                  .groups = w.groups,
                  .bits = static_cast<int>(w.bits),
                  .scale_panel = scale,
                  .zero_panel = zero});
  return {w.panel(panel), w.in_panels ? source : scale, zero};
}

void run_codes(const WeightOnly& w, const Codes& c, int64_t segment, const Result& result) {
  const Tiles tiles(c.tokens, kTile / c.digits);
  const CodeTiles x = code_tiles(c, tiles, w.K, segment);
  const bool blocks = x.segments == 1 || segment % w.block() == 0;
  WeightOnlyInt8GemmFn* const kernel =
      blocks ? weight_only_int8_gemm() : weight_only_int8_gemm_portable;
  const int64_t products = c.tokens * c.digits * w.K * kPanel;
  for_panels(w.N, products, kGrain, [&](int64_t panel) {
    const Panel ready = prepare(w, panel);
    const int64_t next = (panel + 1) * kPanel * w.groups;
    const bool fetch = w.groups > 1 && (panel + 1) * kPanel < w.N;
    alignas(64) float y[kTile * kPanel];
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t row = tiles.begin(t) * c.digits;
      kernel({.weight = ready.weight,
              .bits = static_cast<int>(w.bits),
              .scale = ready.scale,
              .zero = ready.zero,
              .K = w.K,
              .segment = segment,
              .segments_per_group = w.groups == 1 ? x.segments : w.group() / segment,
              .x = x.x + row * x.width,
              .x_scale = x.scale + row * x.segments,
              .x_sum = x.sum + row * x.segments,
              .rows = tiles.size(t) * c.digits,
              .y = y,
              .next_scale = fetch && t == 0 ? w.scale + next : nullptr,
              .next_zero = fetch && w.zero_point != nullptr ? w.zero_point + next : nullptr});
      result.put(y, c.digits, tiles.begin(t), tiles.size(t), panel);
    }
  });
}

// Floats as three int8 digits. Returns false, having done nothing, where they cannot hold x.
bool run_split(const WeightOnly& w, const Rows& x, int64_t m, const Result& result) {
  const int64_t segment = segment_of(w.K, w.group(), w.K, kSplitSegment);
  if (w.groups > 1 && segment % w.block() != 0) return false;
  const std::optional<Codes> digits = split_floats(x, m, result.rows, segment);
  if (digits.has_value()) run_codes(w, *digits, segment, result);
  return digits.has_value();
}

void run_float(const WeightOnly& w, const Rows& x, int64_t m, const Result& result) {
  const bool blocks = w.groups == 1 || w.group() % w.block() == 0;
  WeightOnlyPanelFn* const gemv = blocks ? weight_only_gemv() : weight_only_gemv_portable;
  WeightOnlyPanelFn* const dequantize =
      blocks ? weight_only_dequantize() : weight_only_dequantize_portable;
  const auto call = [&](int64_t panel) {
    const Panel p = prepare(w, panel);
    return WeightOnlyPanel{.weight = p.weight,
                           .bits = static_cast<int>(w.bits),
                           .scale = p.scale,
                           .zero = p.zero,
                           .K = w.K,
                           .group = w.group(),
                           .k = 0,
                           .count = w.K,
                           .dense = nullptr,
                           .x = nullptr,
                           .y = nullptr};
  };
  float_panels(x, m, result, call, gemv, dequantize);
}

}  // namespace

WeightOnly::WeightOnly(const char* op, const Tensor& weight, const Tensor& weight_scale,
                       const OptionalTensor& weight_zero_point, int64_t bits, int64_t K)
    : GroupedWeight(op, weight, weight_scale, bits, K), zero_point(nullptr) {
  if (!weight_zero_point.has_value()) return;
  const Tensor& zero = *weight_zero_point;
  bool same = zero.dim() == weight_scale.dim();
  for (int64_t i = 0; same && i < zero.dim(); ++i) same = zero.size(i) == weight_scale.size(i);
  LLMQ_CHECK(same && zero.scalar_type() == ScalarType::Char, op, "weight_zero_point must be int8 ",
             shape_of(weight_scale), " as weight_scale, got ", shown(zero));
  LLMQ_CHECK(zero.is_contiguous(), op, "weight_zero_point must be contiguous");
  zero_point = static_cast<const int8_t*>(zero.const_data_ptr());
}

void weight_only_product(const WeightOnly& w, const float* bias, const Rows& x,
                         std::optional<int64_t> x_group, void* y) {
  const int64_t N = w.N, K = x.K;
  const bool codes = x_group.has_value(), split = x.M <= split_tokens();
  const int64_t pass = !codes && split ? kPassRows / 3 : kPassRows;
  for (int64_t m = 0; m < x.M; m += pass) {
    const Result result(y, x, m, std::min(pass, x.M - m), N, bias);
    if (K == 0) {
      const float nothing[kPanel] = {};
      for (int64_t i = 0; i < result.rows * ceil_div(N, kPanel); ++i) {
        result.put(nothing, 1, i % result.rows, 1, i / result.rows);
      }
    } else if (codes) {
      const Activations a = quantize(x, m, result.rows, *x_group);
      const int64_t group = *x_group == 0 ? K : *x_group;
      run_codes(w, {a.codes, a.stride, a.scale, a.offset, a.groups, group, result.rows, 1},
                segment_of(K, w.group(), group, kLongestSegment), result);
    } else if (!split || !run_split(w, x, m, result)) {
      run_float(w, x, m, result);
    }
    result.store();
  }
}

Tensor weight_only_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                          const OptionalTensor& weight_zero_point, const OptionalTensor& bias,
                          int64_t bits, std::optional<int64_t> activation_group_size) {
  const TensorRows rows = rows_of(kOp, x);
  const WeightOnly w(kOp, weight, weight_scale, weight_zero_point, bits, rows.K);
  check_group(kOp, activation_group_size.value_or(0), rows.K);
  const float* const biases = float_bias(kOp, bias, w.N);
  const Tensor y = empty_output(rows, w.N);
  if (rows.M == 0 || w.N == 0) return y;
  announce(kOp, rows.M, w.N, rows.K);
  weight_only_product(w, biases, rows, activation_group_size, y.mutable_data_ptr());
  return y;
}

}  // namespace llmq
