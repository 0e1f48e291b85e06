// int8_linear (W8A8): quantizes x, then runs the panels of the weight over it.
#include <algorithm>

#include "dispatch.h"
#include "driver.h"

namespace llmq {
namespace {

constexpr const char* kOp = "int8_linear";

// Tokens a pass: bounds the scratch, and keeps their codes in the second-level cache.
constexpr int64_t kMaxTokens = 256;

constexpr int64_t kPanels = 4;       // that a thread takes at once
constexpr int64_t kGrain = 1 << 23;  // products: 40 us of one core from the second-level cache

}  // namespace

void int8_gemm_any_group(const Int8Gemm& g, int64_t K, int64_t group) {
  for (int64_t m = 0; m < g.M; ++m) {
    for (int64_t n = 0; n < g.N; ++n) {
      const uint8_t* lane = g.weight + n / kPanel * g.K4 * kBlockBytes + n % kPanel * 4;
      float sum = 0;
      for (int64_t start = 0; start < K; start += group) {
        int32_t dot = 0;
        for (int64_t k = start; k < start + group; ++k) {
          const int32_t w = lane[k / 4 * kBlockBytes + k % 4] - 128;
          dot += w * g.x[m * g.x_stride + k];
        }
        sum += static_cast<float>(dot) * g.x_scale[m * g.groups + start / group];
      }
      g.y[m * g.y_stride + n] = sum * g.weight_scale[n] + (g.bias == nullptr ? 0 : g.bias[n]);
    }
  }
}

Int8Weight::Int8Weight(const char* op, const Tensor& weight, const Tensor& weight_scale, int64_t K)
    : K(K) {
  LLMQ_CHECK(weight_scale.scalar_type() == ScalarType::Float && weight_scale.dim() == 2 &&
                 weight_scale.size(1) == 1,
             op, "weight_scale must be float32 [N, 1], got ", shown(weight_scale));
  N = weight_scale.size(0);
  panels = llmq::panels(op, weight, 8, N, K);
  scale = float_data(op, "weight_scale", weight_scale);
}

void int8_columns(const Int8Weight& w, const float* bias, const Activations& a, int64_t tokens,
                  int64_t n, int64_t count, float* y, int64_t y_stride) {
  const int64_t K4 = ceil_div(w.K, 4), group = a.groups == 0 ? w.K : w.K / a.groups;
  const Int8Gemm gemm{.weight = w.panels + n * K4 * 4,
                      .x = a.codes,
                      .x_stride = a.stride,
                      .x_scale = a.scale,
                      .x_offset = a.offset,
                      .weight_scale = w.scale + n,
                      .bias = bias == nullptr ? nullptr : bias + n,
                      .y = y,
                      .y_stride = y_stride,
                      .M = tokens,
                      .N = count,
                      .K4 = K4,
                      .groups = a.groups};
  if (a.groups == 1 || group % 4 == 0) {
    int8_gemm()(gemm);
  } else {
    int8_gemm_any_group(gemm, w.K, group);
  }
}

void int8_product(const Int8Weight& w, const float* bias, const Activations& a, int64_t tokens,
                  float* y) {
  constexpr int64_t kColumns = kPanels * kPanel;
  parallel_units(ceil_div(w.N, kColumns), tokens * w.K * kColumns, kGrain,
                 [&](int64_t begin, int64_t end) {
                   const int64_t n = begin * kColumns, count = std::min(w.N, end * kColumns) - n;
                   int8_columns(w, bias, a, tokens, n, count, y + n, w.N);
                 });
}

Tensor int8_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                   const OptionalTensor& bias, int64_t activation_group_size,
                   const OptionalTensor& activation_scale) {
  const TensorRows rows = rows_of(kOp, x);
  const Int8Weight w(kOp, weight, weight_scale, rows.K);
  const int64_t M = rows.M, N = w.N;
  check_group(kOp, activation_group_size, rows.K);
  const float* const given = given_scale(kOp, activation_scale, activation_group_size, rows.K);
  const float* const biases = float_bias(kOp, bias, N);
  const Tensor out = empty_output(rows, N);
  if (M == 0 || N == 0) return out;
  announce(kOp, M, N, rows.K);

  char* const y = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t m = 0; m < M; m += kMaxTokens) {
    const int64_t tokens = std::min(kMaxTokens, M - m);
    const Activations a = quantize(rows, m, tokens, activation_group_size, given);
    char* const target = y + m * N * rows.element_size();
    float* const result = rows.dtype == Dtype::f32 ? reinterpret_cast<float*>(target)
                                                   : scratch<float>(Slot::y, tokens * N);
    int8_product(w, biases, a, tokens, result);
    if (rows.dtype != Dtype::f32) store_rows(result, N, target, rows.dtype, tokens, N);
  }
  return out;
}

}  // namespace llmq
