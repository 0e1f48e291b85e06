// codebook_linear: w = codebook[code] · scale[n, k / group], 8 or 4 bits, looked up on the fly.
#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "driver.h"
#include "tiles.h"

namespace llmq {
namespace {

constexpr const char* kOp = "codebook_linear";

// The codebooks in the order of the stored bytes (code ^ 0x80 for bits 8), and for a single one of
// 8 bits the four byte planes of its floats; in Slot::extra.
struct Codebooks {
  Codebooks(const float* source, int64_t rows, int64_t bits)
      : size(int64_t{1} << bits), shared(rows == 1) {
    const int64_t count = shared ? size : round_up(rows, kPanel) * size;
    float* const floats = scratch<float>(Slot::extra, count + 256);
    const int64_t flip = bits == 8 ? 0x80 : 0;
    for (int64_t i = 0; i < rows * size; ++i) floats[i] = source[i ^ flip];
    std::fill(floats + rows * size, floats + count, 0.0f);  // of the last panel's absent outputs
    auto* const bytes = reinterpret_cast<uint8_t*>(floats + count);
    for (int64_t i = 0; shared && bits == 8 && i < 256; ++i) {
      uint32_t word;
      std::memcpy(&word, floats + i, 4);
      for (int64_t b = 0; b < 4; ++b) bytes[b * 256 + i] = static_cast<uint8_t>(word >> (8 * b));
    }
    values = floats;
    planes = bytes;
  }
  const float* of(int64_t panel) const { return values + (shared ? 0 : panel * kPanel * size); }

  int64_t size;
  bool shared;
  const float* values;
  const uint8_t* planes;
};

}  // namespace

Tensor codebook_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_codebook,
                       const Tensor& weight_scale, const OptionalTensor& bias, int64_t bits) {
  const Rows rows = rows_of(kOp, x);
  LLMQ_CHECK(weight_scale.dim() == 2, kOp, "weight_scale must be [N, groups]");
  const int64_t M = rows.M, N = weight_scale.size(0), K = rows.K, groups = weight_scale.size(1);
  LLMQ_CHECK(groups > 0 && K % groups == 0, kOp, "weight_scale has ", groups,
             " groups, which do not divide K=", K);
  const uint8_t* const weights = panels(kOp, weight, bits, N, K);
  const float* const scales = float_data(kOp, "weight_scale", weight_scale);
  const float* const table = float_data(kOp, "weight_codebook", weight_codebook);
  LLMQ_CHECK(weight_codebook.dim() == 2 &&
                 (weight_codebook.size(0) == 1 || weight_codebook.size(0) == N) &&
                 weight_codebook.size(1) == int64_t{1} << bits,
             kOp, "weight_codebook must be [1 or ", N, ", ", int64_t{1} << bits, "]");
  const float* const biases = float_bias(kOp, bias, N);
  const Tensor y = empty_output(rows, N);
  if (M == 0 || N == 0) return y;
  announce(kOp, M, N, K);

  const Codebooks codebooks(table, weight_codebook.size(0), bits);
  const int64_t group = std::max<int64_t>(K / groups, 1), block = 32 / bits;
  const bool blocks = codebooks.shared && (groups == 1 || group % block == 0);
  CodebookPanelFn* const gemv = blocks ? codebook_gemv() : codebook_gemv_portable;
  CodebookPanelFn* const dequantize = blocks ? codebook_dequantize() : codebook_dequantize_portable;

  const auto prepare = [&](int64_t panel) {
    const int64_t first = panel * kPanel;
    float* const scale = scratch<float>(Slot::panel, groups * kPanel);
    panel_scales()({.scale = scales + first * groups,
                    .zero_point = nullptr,
                    .lanes = std::min(kPanel, N - first),
                    .groups = groups,
                    .bits = 0,
                    .scale_panel = scale,
                    .zero_panel = nullptr});
    return CodebookPanel{.weight = weights + panel * ceil_div(K, block) * kBlockBytes,
                         .bits = static_cast<int>(bits),
                         .codebook = codebooks.of(panel),
                         .codebook_stride = codebooks.shared ? 0 : codebooks.size,
                         .planes = codebooks.planes,
                         .scale = scale,
                         .K = K,
                         .group = group,
                         .k = 0,
                         .count = K,
                         .dense = nullptr,
                         .x = nullptr,
                         .y = nullptr};
  };
  for (int64_t m = 0; m < M; m += kPassRows) {
    const Result result(y, rows, m, std::min(kPassRows, M - m), N, biases);
    float_panels(
        rows, m, result, true, panel_gemm(), prepare,
        [&](CodebookPanel p, const float* inputs, float* out) {
          p.x = inputs;
          p.y = out;
          gemv(p);
        },
        [&](CodebookPanel p, int64_t k, int64_t count, float* dense) {
          p.k = k;
          p.count = count;
          p.dense = dense;
          dequantize(p);
        });
    result.store();
  }
  return y;
}

}  // namespace llmq
