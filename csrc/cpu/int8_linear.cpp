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

Tensor int8_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                   const OptionalTensor& bias, int64_t activation_group_size) {
  const Rows rows = rows_of(kOp, x);
  LLMQ_CHECK(weight_scale.dim() == 2 && weight_scale.size(1) == 1, kOp,
             "weight_scale must be [N, 1]; weight_only_linear takes groups");
  const int64_t M = rows.M, N = weight_scale.size(0), K = rows.K, K4 = ceil_div(K, 4);
  check_group(kOp, activation_group_size, K);
  const uint8_t* const weights = panels(kOp, weight, 8, N, K);
  const float* const scales = float_data(kOp, "weight_scale", weight_scale);
  const float* const biases = float_bias(kOp, bias, N);
  const Tensor out = empty_output(rows, N);
  if (M == 0 || N == 0) return out;
  announce(kOp, M, N, K);

  const int64_t group = activation_group_size;
  const bool blocks = group == 0 || group == K || group % 4 == 0;
  Int8GemmFn* const kernel = int8_gemm();
  char* const y = static_cast<char*>(out.mutable_data_ptr());

  for (int64_t m = 0; m < M; m += kMaxTokens) {
    const int64_t tokens = std::min(kMaxTokens, M - m);
    const Activations a = quantize(rows, m, tokens, group);
    char* const target = y + m * N * rows.element_size();
    float* const result = rows.dtype == Dtype::f32 ? reinterpret_cast<float*>(target)
                                                   : scratch<float>(Slot::y, tokens * N);
    const auto run = [&](int64_t begin, int64_t end) {
      const int64_t n = begin * kPanels * kPanel;
      const Int8Gemm gemm{.weight = weights + n * K4 * 4,
                          .x = a.codes,
                          .x_stride = a.stride,
                          .x_scale = a.scale,
                          .x_offset = a.offset,
                          .weight_scale = scales + n,
                          .bias = biases == nullptr ? nullptr : biases + n,
                          .y = result + n,
                          .y_stride = N,
                          .M = tokens,
                          .N = std::min(N, end * kPanels * kPanel) - n,
                          .K4 = K4,
                          .groups = a.groups};
      if (blocks) {
        kernel(gemm);
      } else {
        int8_gemm_any_group(gemm, K, group);
      }
    };
    const int64_t products = tokens * K * kPanels * kPanel;
    parallel_units(ceil_div(N, kPanels * kPanel), products, kGrain, run);
    if (rows.dtype != Dtype::f32) store_rows(result, N, target, rows.dtype, tokens, N);
  }
  return out;
}

}  // namespace llmq
