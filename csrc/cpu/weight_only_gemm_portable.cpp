// weight_only_linear in plain C++, for any segment: one input of 16 outputs at a time, in loops
// over the outputs that a compiler turns into whatever vectors it has. Also serves, on every
// instruction set, segments that end inside a block.
#include <cstring>

#include "kernels.h"

namespace llmq {
namespace {

// The 16 outputs' words of a block as input k needs them, and the shift to its code.
struct Input {
  uint32_t words[kPanel];
  int shift;
};

template <int kBits>
Input input_of(const uint8_t* weight, int64_t k) {
  constexpr int64_t kInputs = 32 / kBits;
  const int64_t j = k % kInputs;
  Input input;
  std::memcpy(input.words, weight + k / kInputs * kBlockBytes, kBlockBytes);
  input.shift = static_cast<int>(8 * (j % 4) + 4 * (j / 4));
  return input;
}

// (w − zero) of the 16 outputs at input k.
template <int kBits, class T>
void decode(const uint8_t* weight, const int32_t* zero, int64_t k, T (&value)[kPanel]) {
  const Input input = input_of<kBits>(weight, k);
  for (int64_t n = 0; n < kPanel; ++n) {
    const auto code = static_cast<int32_t>((input.words[n] >> input.shift) & ((1u << kBits) - 1));
    value[n] = static_cast<T>(code - zero[n]);
  }
}

template <int kBits, int kRows>
void int8_gemm(const WeightOnlyInt8Gemm& g, int64_t row) {
  float* const y = g.y + row * kPanel;
  for (int64_t i = 0; i < kRows * kPanel; ++i) y[i] = 0;
  const int32_t no_zero[kPanel] = {};
  for (int64_t begin = 0, s = 0; begin < g.K; begin += g.segment, ++s) {
    const int64_t end = g.K - begin < g.segment ? g.K : begin + g.segment;
    const int64_t group = s / g.segments_per_group * kPanel;
    const int32_t* const x_sum = g.x_sum + s * g.rows + row;
    const float* const x_scale = g.x_scale + s * g.rows + row;
    int32_t dot[kRows][kPanel];
    for (int r = 0; r < kRows; ++r) {
      for (int64_t n = 0; n < kPanel; ++n) dot[r][n] = g.zero[group + n] * x_sum[r];
    }
    for (int64_t k = begin; k < end; ++k) {
      int16_t code[kPanel];  // 16 × 16 → 32 bits is the one integer product that every x86 has
      decode<kBits>(g.weight, no_zero, k, code);
      const int8_t* const x = g.x + (k / 4 * g.rows + row) * 4 + k % 4;
      for (int r = 0; r < kRows; ++r) {
        const int16_t input = x[r * 4];
        for (int64_t n = 0; n < kPanel; ++n) dot[r][n] += code[n] * input;
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int64_t n = 0; n < kPanel; ++n) {
        y[r * kPanel + n] += static_cast<float>(dot[r][n]) * (g.scale[group + n] * x_scale[r]);
      }
    }
  }
}

template <int kBits>
void int8_gemm_rows(const WeightOnlyInt8Gemm& g) {
  int64_t row = 0;
  for (; row + 2 <= g.rows; row += 2) int8_gemm<kBits, 2>(g, row);
  if (row < g.rows) int8_gemm<kBits, 1>(g, row);
}

template <int kBits>
void gemv(const WeightOnlyPanel& p) {
  float y[kPanel] = {};
  for (int64_t begin = 0, g = 0; begin < p.K; begin += p.group, g += kPanel) {
    float sum[kPanel] = {};
    for (int64_t k = begin; k < begin + p.group; ++k) {
      float value[kPanel];
      decode<kBits>(p.weight, p.zero + g, k, value);
      for (int64_t n = 0; n < kPanel; ++n) sum[n] += value[n] * p.x[k];
    }
    for (int64_t n = 0; n < kPanel; ++n) y[n] += sum[n] * p.scale[g + n];
  }
  std::memcpy(p.y, y, sizeof(y));
}

template <int kBits>
void dequantize(const WeightOnlyPanel& p) {
  for (int64_t k = p.k; k < p.k + p.count; ++k) {
    const int64_t g = k / p.group * kPanel;
    float value[kPanel];
    decode<kBits>(p.weight, p.zero + g, k, value);
    float* const dense = p.dense + (k - p.k) * kPanel;
    for (int64_t n = 0; n < kPanel; ++n) dense[n] = value[n] * p.scale[g + n];
  }
}

template <int kRows>
void panel_gemm(const PanelGemm& g, int64_t row) {
  float* const y = g.y + row * kPanel;
  float sum[kRows][kPanel];
  std::memcpy(sum, y, sizeof(sum));
  for (int64_t k = 0; k < g.K; ++k) {
    for (int r = 0; r < kRows; ++r) {
      const float input = g.x[k * g.rows + row + r];
      for (int64_t n = 0; n < kPanel; ++n) sum[r][n] += g.dense[k * kPanel + n] * input;
    }
  }
  std::memcpy(y, sum, sizeof(sum));
}

}  // namespace

void weight_only_int8_gemm_portable(const WeightOnlyInt8Gemm& g) {
  g.bits == 8 ? int8_gemm_rows<8>(g) : int8_gemm_rows<4>(g);
}

void weight_only_gemv_portable(const WeightOnlyPanel& p) { p.bits == 8 ? gemv<8>(p) : gemv<4>(p); }

void weight_only_dequantize_portable(const WeightOnlyPanel& p) {
  p.bits == 8 ? dequantize<8>(p) : dequantize<4>(p);
}

void panel_gemm_portable(const PanelGemm& g) {
  int64_t row = 0;
  for (; row + 2 <= g.rows; row += 2) panel_gemm<2>(g, row);
  if (row < g.rows) panel_gemm<1>(g, row);
}

void panel_scales_portable(const PanelScales& p) {
  const int32_t stored_zero = p.bits == 8 ? 128 : p.zero_point == nullptr ? 8 : 0;
  for (int64_t n = 0; n < kPanel; ++n) {
    const bool present = n < p.lanes;
    for (int64_t g = 0; g < p.groups; ++g) {
      const int64_t i = n * p.groups + g;
      p.scale_panel[g * kPanel + n] = present ? p.scale[i] : 0;
      if (p.bits == 0) continue;
      const int32_t zero = present && p.zero_point != nullptr ? p.zero_point[i] : 0;
      p.zero_panel[g * kPanel + n] = stored_zero + zero;
    }
  }
}

}  // namespace llmq
