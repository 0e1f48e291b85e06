// codebook_linear: w = codebook[code] · scale[n, k / group], 8 or 4 bits, looked up on the fly.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "dispatch.h"
#include "driver.h"
#include "tiles.h"

namespace llmq {
namespace {

constexpr const char* kOp = "codebook_linear";

constexpr float kTop = 0x7f7f00;  // the largest entry in units, as in split_rows

// The codebooks in the order of the stored bytes (code ^ 0x80 for bits 8), in Slot::extra.
struct Codebooks {
  Codebooks(const float* source, int64_t rows, int64_t bits)
      : size(int64_t{1} << bits), shared(rows == 1) {
    const int64_t count = shared ? size : round_up(rows, kPanel) * size;
    values = scratch<float>(Slot::extra, count + 256);
    const int64_t flip = bits == 8 ? 0x80 : 0;
    for (int64_t i = 0; i < rows * size; ++i) values[i] = source[i ^ flip];
    std::fill(values + rows * size, values + count, 0.0f);  // the last panel's absent outputs
    bytes = reinterpret_cast<uint8_t*>(values + count);
  }
  const float* of(int64_t panel) const { return values + (shared ? 0 : panel * kPanel * size); }

  // The four byte planes of a single codebook of 256 floats.
  void planes() const {
    for (int64_t i = 0; i < 256; ++i) {
      uint32_t word;
      std::memcpy(&word, values + i, 4);
      for (int64_t b = 0; b < 4; ++b) bytes[b * 256 + i] = static_cast<uint8_t>(word >> (8 * b));
    }
  }

  // Its digits, three an entry, or two where all entries lie on a grid of 16 bits, as
  // formats/codebook.py puts them. Fewer look-ups and products are then needed.
  struct Digits {
    float unit;  // 0 where three digits cannot hold it
    bool third;
  };
  Digits digits() const {
    float top = 0;
    for (int64_t i = 0; i < 256; ++i) top = std::max(top, std::abs(values[i]));
    if (!std::all_of(values, values + 256, [](float v) { return std::abs(v) <= 1e30f; })) return {};
    if (top < 1e-30f) return {};
    int exponent;
    std::frexp(top, &exponent);
    const float grid = std::ldexp(1.0f, 15 - exponent);
    bool third = false;
    for (int64_t i = 0; i < 256; ++i) {
      const float steps = values[i] * grid;
      third |= steps != static_cast<float>(static_cast<int32_t>(steps));
    }
    const float units_of_1 = third ? kTop / top : 256 * grid;
    for (int64_t i = 0; i < 256; ++i) {
      const float units = values[i] * units_of_1;
      const int32_t digits = static_cast<int32_t>(units + (units < 0 ? -0.5f : 0.5f)) + (1 << 23);
      for (int64_t d = 0; d < 3; ++d) {
        bytes[d * 256 + i] = static_cast<uint8_t>(digits >> (16 - 8 * d));
      }
    }
    return {third ? top / kTop : 1 / units_of_1, third};
  }

  int64_t size;
  bool shared;
  float* values;
  uint8_t* bytes;
};

// The scales of a panel turned into Slot::panel of this thread.
const float* prepare(const GroupedWeight& w, int64_t panel) {
  const int64_t first = panel * kPanel;
  if (w.in_panels) return w.scale + first * w.groups;
  float* const scale = scratch<float>(Slot::panel, w.groups * kPanel);
  panel_scales()({.scale = w.scale + first * w.groups,
                  .zero_point = nullptr,
                  .lanes = std::min(kPanel, w.N - first),
                  .groups = w.groups,
                  .bits = 0,
                  .scale_panel = scale,
                  .zero_panel = nullptr});
  return scale;
}

// One token times an 8-bit codebook, both as digits. Returns false where they cannot hold either.
bool run_digits(const GroupedWeight& w, const Codebooks& codebooks, const Rows& x,
                const Result& result) {
  const int64_t segment = segment_of(w.K, w.group(), w.K, kSplitSegment);
  if (w.groups > 1 && segment % w.block() != 0) return false;
  const Codebooks::Digits entries = codebooks.digits();
  if (entries.unit == 0) return false;
  const std::optional<Codes> digits = split_floats(x, 0, 1, segment);
  if (!digits.has_value()) return false;
  const CodeTiles tile = code_tiles(*digits, Tiles(1, 1), w.K, segment);
  for_panels(w.N, w.K * kPanel, kGrain, [&](int64_t panel) {
    alignas(64) float y[kPanel];
    codebook_int8_gemv()({.weight = w.panel(panel),
                          .digits = codebooks.bytes,
                          .third = entries.third,
                          .unit = entries.unit,
                          .scale = prepare(w, panel),
                          .K = w.K,
                          .segment = segment,
                          .segments_per_group = w.groups == 1 ? tile.segments : w.group() / segment,
                          .x = tile.x,
                          .x_scale = tile.scale,
                          .x_sum = tile.sum,
                          .y = y});
    result.put(y, 1, 0, 1, panel);
  });
  return true;
}

void run_float(const GroupedWeight& w, const Codebooks& codebooks, const Rows& x, int64_t m,
               const Result& result) {
  const bool blocks = codebooks.shared && (w.groups == 1 || w.group() % w.block() == 0);
  CodebookPanelFn* const gemv = blocks ? codebook_gemv() : codebook_gemv_portable;
  CodebookPanelFn* const dequantize = blocks ? codebook_dequantize() : codebook_dequantize_portable;
  if (blocks && w.bits == 8) codebooks.planes();
  const auto call = [&](int64_t panel) {
    return CodebookPanel{.weight = w.panel(panel),
                         .bits = static_cast<int>(w.bits),
                         .codebook = codebooks.of(panel),
                         .codebook_stride = codebooks.shared ? 0 : codebooks.size,
                         .planes = codebooks.bytes,
                         .scale = prepare(w, panel),
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

Tensor codebook_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_codebook,
                       const Tensor& weight_scale, const OptionalTensor& bias, int64_t bits) {
  const TensorRows rows = rows_of(kOp, x);
  const GroupedWeight w(kOp, weight, weight_scale, bits, rows.K);
  const int64_t M = rows.M, N = w.N, K = rows.K;
  LLMQ_CHECK(weight_codebook.scalar_type() == ScalarType::Float && weight_codebook.dim() == 2 &&
                 (weight_codebook.size(0) == 1 || weight_codebook.size(0) == N) &&
                 weight_codebook.size(1) == int64_t{1} << bits,
             kOp, "weight_codebook must be float32 [1 or ", N, ", ", int64_t{1} << bits, "], got ",
             shown(weight_codebook));
  const float* const table = float_data(kOp, "weight_codebook", weight_codebook);
  const float* const biases = float_bias(kOp, bias, N);
  const Tensor y = empty_output(rows, N);
  if (M == 0 || N == 0) return y;
  announce(kOp, M, N, K);

  const Codebooks codebooks(table, weight_codebook.size(0), bits);
  const bool digits = M == 1 && bits == 8 && codebooks.shared && codebook_int8_gemv() != nullptr;
  for (int64_t m = 0; m < M; m += kPassRows) {
    const Result result(y.mutable_data_ptr(), rows, m, std::min(kPassRows, M - m), N, biases);
    if (!digits || K == 0 || !run_digits(w, codebooks, rows, result)) {
      run_float(w, codebooks, rows, m, result);
    }
    result.store();
  }
  return y;
}

}  // namespace llmq
