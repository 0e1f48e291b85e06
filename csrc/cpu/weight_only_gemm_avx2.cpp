// weight_only_linear on AVX2 + FMA.
//
// int8 activations: tile of 1 panel × 4 rows; u8 × s8 products in pairs (vpmaddubsw), then in fours
// (vpmaddwd). Nibbles are operands as they are. Bytes go in as |w| · sign(x, w), which cannot
// saturate: 128 · 127 · 2 < 2^15.
// Float activations, one row: each word of a block gives 4 or 8 inputs of 8 outputs by shift, mask,
// exact integer − zero, conversion and FMA: 5 instructions for 8 weights. More rows share
// dequantized weights (panel_gemm, 6 rows × 16 outputs in 12 accumulators).
#include <immintrin.h>

#include "kernels.h"

namespace llmq {
namespace {

constexpr int64_t kHalf = 8;      // outputs a register; a block of a panel is two
constexpr int64_t kAhead = 1024;  // bytes between the block in use and the one to fetch

__m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

__m256i broadcast4(const int8_t* x) {
  return _mm256_set1_epi32(*reinterpret_cast<const int32_t*>(x));
}

// Four products a lane, summed into int32: 8 outputs × 4 (bits 8) or 8 (bits 4) inputs.
template <int kBits, int kRows>
void multiply(__m256i (&dot)[kRows], const uint8_t* weight, const int8_t* x, int64_t stride) {
  const __m256i ones = _mm256_set1_epi16(1);
  const __m256i block = load(weight);
  if constexpr (kBits == 8) {
    const __m256i code = _mm256_xor_si256(block, _mm256_set1_epi8(-128));
    const __m256i magnitude = _mm256_abs_epi8(code);
    for (int r = 0; r < kRows; ++r) {
      const __m256i input = _mm256_sign_epi8(broadcast4(x + r * 4), code);
      const __m256i pairs = _mm256_maddubs_epi16(magnitude, input);
      dot[r] = _mm256_add_epi32(dot[r], _mm256_madd_epi16(pairs, ones));
    }
  } else {
    const __m256i low_nibbles = _mm256_set1_epi8(15);
    const __m256i low = _mm256_and_si256(block, low_nibbles);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(block, 4), low_nibbles);
    for (int r = 0; r < kRows; ++r) {
      const __m256i pairs =
          _mm256_add_epi16(_mm256_maddubs_epi16(low, broadcast4(x + r * 4)),
                           _mm256_maddubs_epi16(high, broadcast4(x + stride + r * 4)));
      dot[r] = _mm256_add_epi32(dot[r], _mm256_madd_epi16(pairs, ones));
    }
  }
}

template <int kBits, int kRows>
void int8_gemm(const WeightOnlyInt8Gemm& g, int64_t row) {
  constexpr int64_t kInputs = 32 / kBits;
  const int64_t stride = g.rows * 4;  // bytes from 4 inputs of the tile to the next 4
  const __m256i bias = _mm256_set1_epi32(kBits == 8 ? 128 : 0);  // codes are multiplied signed
  float* const y = g.y + row * kPanel;
  for (int64_t i = 0; i < kRows * kPanel; ++i) y[i] = 0;
  for (int64_t k = 0, s = 0; k < g.K; k += g.segment, ++s) {
    const int64_t inputs = g.K - k < g.segment ? g.K - k : g.segment;
    const int64_t group = s / g.segments_per_group * kPanel;
    const int32_t* const x_sum = g.x_sum + s * g.rows + row;
    const float* const x_scale = g.x_scale + s * g.rows + row;
    for (int64_t half = 0; half < kPanel; half += kHalf) {
      const __m256i zero = _mm256_sub_epi32(load(g.zero + group + half), bias);
      __m256i dot[kRows];
      for (int r = 0; r < kRows; ++r) {
        dot[r] = _mm256_mullo_epi32(zero, _mm256_set1_epi32(x_sum[r]));
      }
      const int8_t* x = g.x + k / 4 * stride + row * 4;
      const uint8_t* weight = g.weight + k / kInputs * kBlockBytes + half * 4;
      for (int64_t i = 0; i < inputs; i += kInputs) {
        if (half == 0) {
          _mm_prefetch(reinterpret_cast<const char*>(weight + kAhead), _MM_HINT_T0);
        }
        multiply<kBits, kRows>(dot, weight, x, stride);
        weight += kBlockBytes;
        x += kInputs / 4 * stride;
      }
      const __m256 scale = _mm256_loadu_ps(g.scale + group + half);
      for (int r = 0; r < kRows; ++r) {
        const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(x_scale[r]));
        float* const target = y + r * kPanel + half;
        const __m256 sum = _mm256_loadu_ps(target);
        _mm256_storeu_ps(target, _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[r]), both, sum));
      }
    }
  }
}

template <int kBits>
void int8_gemm_rows(const WeightOnlyInt8Gemm& g) {
  int64_t row = 0;
  for (; row + 4 <= g.rows; row += 4) int8_gemm<kBits, 4>(g, row);
  if (g.rows - row == 3) int8_gemm<kBits, 3>(g, row);
  if (g.rows - row == 2) int8_gemm<kBits, 2>(g, row);
  if (g.rows - row == 1) int8_gemm<kBits, 1>(g, row);
}

// Input j of the 8 outputs of half a block.
template <int kBits>
__m256 decode(__m256i block, __m256i zero, int j) {
  const __m256i mask = _mm256_set1_epi32((1 << kBits) - 1);
  const __m256i code = _mm256_and_si256(_mm256_srli_epi32(block, 8 * (j % 4) + 4 * (j / 4)), mask);
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(code, zero));
}

template <int kBits>
void gemv(const WeightOnlyPanel& p) {
  constexpr int kInputs = 32 / kBits;
  __m256 y[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  const uint8_t* weight = p.weight;
  for (int64_t k = 0, g = 0; k < p.K; k += p.group, g += kPanel) {
    const __m256i zero[2] = {load(p.zero + g), load(p.zero + g + kHalf)};
    // Four chains a half hide the FMA's latency of 4 cycles.
    __m256 sum[2][4];
    for (auto& half : sum) {
      for (auto& chain : half) chain = _mm256_setzero_ps();
    }
    for (int64_t i = k; i < k + p.group; i += kInputs, weight += kBlockBytes) {
      const __m256i block[2] = {load(weight), load(weight + 32)};
      _mm_prefetch(reinterpret_cast<const char*>(weight + kAhead), _MM_HINT_T0);
      for (int j = 0; j < kInputs; ++j) {
        const __m256 input = _mm256_set1_ps(p.x[i + j]);
        for (int h = 0; h < 2; ++h) {
          __m256& chain = sum[h][j % 4];
          chain = _mm256_fmadd_ps(decode<kBits>(block[h], zero[h], j), input, chain);
        }
      }
    }
    for (int h = 0; h < 2; ++h) {
      const __m256 total =
          _mm256_add_ps(_mm256_add_ps(sum[h][0], sum[h][1]), _mm256_add_ps(sum[h][2], sum[h][3]));
      y[h] = _mm256_fmadd_ps(total, _mm256_loadu_ps(p.scale + g + h * kHalf), y[h]);
    }
  }
  _mm256_storeu_ps(p.y, y[0]);
  _mm256_storeu_ps(p.y + kHalf, y[1]);
}

template <int kBits>
void dequantize(const WeightOnlyPanel& p) {
  constexpr int kInputs = 32 / kBits;
  float* dense = p.dense;
  for (int64_t k = p.k; k < p.k + p.count; k += kInputs, dense += kInputs * kPanel) {
    const uint8_t* const weight = p.weight + k / kInputs * kBlockBytes;
    for (int64_t half = 0; half < kPanel; half += kHalf) {
      const int64_t g = k / p.group * kPanel + half;
      const __m256i block = load(weight + half * 4), zero = load(p.zero + g);
      const __m256 scale = _mm256_loadu_ps(p.scale + g);
      for (int j = 0; j < kInputs; ++j) {
        const __m256 value = _mm256_mul_ps(decode<kBits>(block, zero, j), scale);
        _mm256_storeu_ps(dense + j * kPanel + half, value);
      }
    }
  }
}

template <int kRows>
void panel_gemm(const PanelGemm& g, int64_t row) {
  float* const y = g.y + row * kPanel;
  const float* x = g.x + row;
  __m256 sum[kRows][2];
  for (int r = 0; r < kRows; ++r) {
    sum[r][0] = _mm256_loadu_ps(y + r * kPanel);
    sum[r][1] = _mm256_loadu_ps(y + r * kPanel + kHalf);
  }
  for (int64_t k = 0; k < g.K; ++k, x += g.rows) {
    const __m256 low = _mm256_loadu_ps(g.dense + k * kPanel);
    const __m256 high = _mm256_loadu_ps(g.dense + k * kPanel + kHalf);
    for (int r = 0; r < kRows; ++r) {
      const __m256 input = _mm256_set1_ps(x[r]);
      sum[r][0] = _mm256_fmadd_ps(low, input, sum[r][0]);
      sum[r][1] = _mm256_fmadd_ps(high, input, sum[r][1]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    _mm256_storeu_ps(y + r * kPanel, sum[r][0]);
    _mm256_storeu_ps(y + r * kPanel + kHalf, sum[r][1]);
  }
}

}  // namespace

void weight_only_int8_gemm_avx2(const WeightOnlyInt8Gemm& g) {
  g.bits == 8 ? int8_gemm_rows<8>(g) : int8_gemm_rows<4>(g);
}

void weight_only_gemv_avx2(const WeightOnlyPanel& p) { p.bits == 8 ? gemv<8>(p) : gemv<4>(p); }

void weight_only_dequantize_avx2(const WeightOnlyPanel& p) {
  p.bits == 8 ? dequantize<8>(p) : dequantize<4>(p);
}

void panel_gemm_avx2(const PanelGemm& g) {
  using Fn = void(const PanelGemm&, int64_t);
  static constexpr Fn* kRows[] = {panel_gemm<1>, panel_gemm<2>, panel_gemm<3>,
                                  panel_gemm<4>, panel_gemm<5>, panel_gemm<6>};
  for (int64_t row = 0; row < g.rows; row += 6) {
    kRows[(g.rows - row < 6 ? g.rows - row : 6) - 1](g, row);
  }
}

}  // namespace llmq
