// weight_only_linear with NEON dot products.
//
// int8 activations: tile of 1 panel × up to 6 rows in 24 accumulators, one sdot for 4 outputs × 4
// inputs × 1 row; bytes are made signed by flipping their top bit, nibbles are operands as they
// are. Float activations come as three int8 digits (split_rows): three sdot and no decoding for 16
// products, where floats need four fmla and a shift, mask, subtraction and conversion a register.
// Bound by sdot for 6 rows, by memory for 1. Where digits cannot hold x, several rows share
// dequantized weights (panel_gemm, 6 rows × 16 outputs). Instructions of GCC 12 for 6 rows: a block
// of bytes 50, 24 of them sdot; of nibbles 98, 48 of them sdot; an input of panel_gemm 40, 24 of
// them fmla. Arm speed is not yet measured.
#include "neon.h"

#if !defined(__ARM_FEATURE_DOTPROD)
#error "setup.py gives this file its instruction set by its name: _neondot"
#endif

namespace llmq {
namespace {

constexpr int64_t kMostRows = 6;

// 16 outputs × 4 (bits 8) or 8 (bits 4) inputs.
template <int kBits, int kRows>
[[gnu::always_inline]] inline void multiply(int32x4_t (&dot)[kRows][kRegisters],
                                            const uint8_t* weight, const int8_t* x,
                                            int64_t stride) {
  for (int part = 0; part < 8 / kBits; ++part, x += stride) {
    int8x16_t w[kRegisters];
    for (int v = 0; v < kRegisters; ++v) {
      const uint8x16_t block = vld1q_u8(weight + 16 * v);
      const uint8x16_t code = kBits == 8  ? veorq_u8(block, vdupq_n_u8(0x80))
                              : part == 0 ? vandq_u8(block, vdupq_n_u8(15))
                                          : vshrq_n_u8(block, 4);
      w[v] = vreinterpretq_s8_u8(code);
    }
    for (int r = 0; r < kRows; ++r) {
      const int8x16_t input = broadcast4(x + 4 * r);
      for (int v = 0; v < kRegisters; ++v) dot[r][v] = vdotq_s32(dot[r][v], w[v], input);
    }
  }
}

template <int kBits, int kRows>
void int8_gemm(const WeightOnlyInt8Gemm& g, int64_t row) {
  constexpr int64_t kInputs = 32 / kBits;
  const int64_t stride = g.rows * 4;  // bytes from 4 inputs of the tile to the next 4
  const int32x4_t bias = vdupq_n_s32(kBits == 8 ? 128 : 0);  // codes are multiplied signed
  const uint8_t* weight = g.weight;
  const int8_t* x = g.x + row * 4;
  const int32_t* x_sum = g.x_sum + row;
  const float* x_scale = g.x_scale + row;
  const float* scale = g.scale;
  const int32_t* zero = g.zero;
  int64_t left_in_group = g.segments_per_group;
  float* const y = g.y + row * kPanel;
  for (int64_t i = 0; i < kRows * kPanel; ++i) y[i] = 0;

  for (int64_t k = 0; k < g.K; k += g.segment) {
    const int64_t inputs = g.K - k < g.segment ? g.K - k : g.segment;
    int32x4_t dot[kRows][kRegisters];
    for (int v = 0; v < kRegisters; ++v) {
      const int32x4_t zeros = vsubq_s32(vld1q_s32(zero + 4 * v), bias);
      for (int r = 0; r < kRows; ++r) dot[r][v] = vmulq_n_s32(zeros, x_sum[r]);
    }
    for (int64_t i = 0; i < inputs; i += kInputs) {
      multiply<kBits, kRows>(dot, weight, x, stride);
      weight += kBlockBytes;
      x += kInputs / 4 * stride;
    }
    // y waits in memory: its 24 registers and those of the dots are more than there are.
    for (int v = 0; v < kRegisters; ++v) {
      const float32x4_t scales = vld1q_f32(scale + 4 * v);
      for (int r = 0; r < kRows; ++r) {
        float* const target = y + r * kPanel + 4 * v;
        const float32x4_t both = vmulq_n_f32(scales, x_scale[r]);
        vst1q_f32(target, vfmaq_f32(vld1q_f32(target), vcvtq_f32_s32(dot[r][v]), both));
      }
    }
    x_sum += g.rows;
    x_scale += g.rows;
    if (--left_in_group == 0) {
      scale += kPanel;
      zero += kPanel;
      left_in_group = g.segments_per_group;
    }
  }
}

template <int kBits>
void int8_gemm_rows(const WeightOnlyInt8Gemm& g) {
  using Fn = void(const WeightOnlyInt8Gemm&, int64_t);
  static constexpr Fn* kTiles[] = {int8_gemm<kBits, 1>, int8_gemm<kBits, 2>, int8_gemm<kBits, 3>,
                                   int8_gemm<kBits, 4>, int8_gemm<kBits, 5>, int8_gemm<kBits, 6>};
  for (int64_t row = 0; row < g.rows; row += kMostRows) {
    kTiles[(g.rows - row < kMostRows ? g.rows - row : kMostRows) - 1](g, row);
  }
}

template <int kBits>
void dequantize(const WeightOnlyPanel& p) {
  constexpr int kInputs = 32 / kBits;
  const uint32x4_t mask = vdupq_n_u32((1 << kBits) - 1);
  float* dense = p.dense;
  for (int64_t k = p.k; k < p.k + p.count; k += kInputs, dense += kInputs * kPanel) {
    const uint8_t* const weight = p.weight + k / kInputs * kBlockBytes;
    const int64_t g = k / p.group * kPanel;
    for (int v = 0; v < kRegisters; ++v) {
      const uint32x4_t block = vreinterpretq_u32_u8(vld1q_u8(weight + 16 * v));
      const int32x4_t zero = vld1q_s32(p.zero + g + 4 * v);
      const float32x4_t scale = vld1q_f32(p.scale + g + 4 * v);
      for (int j = 0; j < kInputs; ++j) {
        const int32x4_t shift = vdupq_n_s32(-(8 * (j % 4) + 4 * (j / 4)));
        const uint32x4_t code = vandq_u32(vshlq_u32(block, shift), mask);
        const int32x4_t value = vsubq_s32(vreinterpretq_s32_u32(code), zero);
        vst1q_f32(dense + j * kPanel + 4 * v, vmulq_f32(vcvtq_f32_s32(value), scale));
      }
    }
  }
}

// Without the pragmas GCC 12 unrolls late and stores all sums at each step: 63 instructions,
// not 40.
template <int kRows>
void panel_gemm(const PanelGemm& g, int64_t row) {
  float* const y = g.y + row * kPanel;
  const float* x = g.x + row;
  float32x4_t sum[kRows][kRegisters];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kRegisters; ++v) sum[r][v] = vld1q_f32(y + r * kPanel + 4 * v);
  }
  for (int64_t k = 0; k < g.K; ++k, x += g.rows) {
    float32x4_t w[kRegisters];
    for (int v = 0; v < kRegisters; ++v) w[v] = vld1q_f32(g.dense + k * kPanel + 4 * v);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kRegisters; ++v) sum[r][v] = vfmaq_n_f32(sum[r][v], w[v], x[r]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kRegisters; ++v) vst1q_f32(y + r * kPanel + 4 * v, sum[r][v]);
  }
}

// What max|x| becomes: 127 below the largest sum of three digits, so that rounding cannot pass it.
constexpr float kTop = 0x7f7f00;

}  // namespace

void weight_only_int8_gemm_neondot(const WeightOnlyInt8Gemm& g) {
  g.bits == 8 ? int8_gemm_rows<8>(g) : int8_gemm_rows<4>(g);
}

void weight_only_dequantize_neondot(const WeightOnlyPanel& p) {
  p.bits == 8 ? dequantize<8>(p) : dequantize<4>(p);
}

void panel_gemm_neondot(const PanelGemm& g) {
  using Fn = void(const PanelGemm&, int64_t);
  static constexpr Fn* kRows[] = {panel_gemm<1>, panel_gemm<2>, panel_gemm<3>,
                                  panel_gemm<4>, panel_gemm<5>, panel_gemm<6>};
  for (int64_t row = 0; row < g.rows; row += kMostRows) {
    kRows[(g.rows - row < kMostRows ? g.rows - row : kMostRows) - 1](g, row);
  }
}

bool split_rows_neondot(const SplitRows& s) {
  const int64_t segments = ceil_div(s.K, s.segment);
  for (int64_t m = 0; m < s.rows; ++m) {
    int8_t* const digits = s.digits + m * 3 * s.digits_stride;
    float* const scale = s.scale + m * 3 * segments;
    for (int64_t i = 0, k = 0; k < s.K; ++i, k += s.segment) {
      const int64_t inputs = s.K - k < s.segment ? s.K - k : s.segment;
      const float* const x = s.x + m * s.x_stride + k;
      // As integers the magnitudes of floats order alike, with infinity and NaN on top.
      uint32x4_t top = vdupq_n_u32(0);
      for (int64_t j = 0; j < inputs; j += 4) {
        const uint32x4_t bits = vreinterpretq_u32_f32(load_lanes(x + j, inputs - j));
        top = vmaxq_u32(top, vandq_u32(bits, vdupq_n_u32(0x7fffffff)));
      }
      const float amax = __builtin_bit_cast(float, vmaxvq_u32(top));
      if (!(amax <= 1e30f && (amax >= 1e-30f || amax == 0))) return false;
      const float inverse = amax == 0 ? 0 : kTop / amax;
      int32x4_t sum[3] = {};
      for (int64_t j = 0; j < inputs; j += 4) {
        const int64_t count = inputs - j < 4 ? inputs - j : 4;
        int32x4_t rest = vcvtnq_s32_f32(vmulq_n_f32(load_lanes(x + j, count), inverse));
        for (int d = 2; d >= 0; --d) {
          const int32x4_t higher = vrshrq_n_s32(rest, 8);
          const int32x4_t digit = d == 0 ? rest : vsubq_s32(rest, vshlq_n_s32(higher, 8));
          sum[d] = vaddq_s32(sum[d], digit);
          const int16x4_t words = vmovn_s32(digit);
          const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
          __builtin_memcpy(digits + d * s.digits_stride + k + j, &bytes, count);
          rest = higher;
        }
      }
      float unit = amax / kTop;
      for (int d = 2; d >= 0; --d, unit *= 256) {
        scale[d * segments + i] = unit;
        s.offset[(m * 3 + d) * segments + i] = -128 * vaddvq_s32(sum[d]);
      }
    }
    for (int d = 0; d < 3; ++d) {
      for (int64_t k = s.K; k < s.digits_columns; ++k) digits[d * s.digits_stride + k] = 0;
    }
  }
  return true;
}

}  // namespace llmq
