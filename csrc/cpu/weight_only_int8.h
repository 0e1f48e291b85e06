// weight_only_linear with int8 activations on 256-bit registers: what AVX2 and AVX-VNNI share.
//
//     y[m, n] = Σ_segments weight scale · x scale · Σ_k (w − zero) · x
//
// The inner sum is exact in int32. Tile: kHalves halves of a panel (8 outputs each) × kRows rows.
// `Products` adds those of half a block:
//
//     static constexpr int kHalves, kRows;  // at most 2 and 6
//     static constexpr bool kSigned;        // whether 8-bit codes enter as stored − 128
//     template <int kBits, int R>
//     static void add(__m256i (&dot)[R], const uint8_t* weight, const int8_t* x, int64_t stride);
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace llmq {
namespace {

constexpr int64_t kHalf = 8;      // outputs a register; a block of a panel is two
constexpr int64_t kAhead = 4096;  // bytes between the block in use and the one to fetch

__m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

template <class Products, int kBits, int R>
void int8_gemm(const WeightOnlyInt8Gemm& g, int64_t row, int64_t half) {
  constexpr int H = Products::kHalves;
  constexpr int64_t kInputs = 32 / kBits;
  const int64_t stride = g.rows * 4;  // bytes from 4 inputs of the tile to the next 4
  // Where 8-bit codes are multiplied signed, their zero is 128 lower.
  const __m256i bias = _mm256_set1_epi32(kBits == 8 && Products::kSigned ? 128 : 0);
  const uint8_t* weight = g.weight + half * 4;
  const int8_t* x = g.x + row * 4;
  const int32_t* x_sum = g.x_sum + row;
  const float* x_scale = g.x_scale + row;
  const float* scale = g.scale + half;
  const int32_t* zero = g.zero + half;
  int64_t left_in_group = g.segments_per_group;
  __m256 y[H][R];
#pragma GCC unroll 2
  for (int h = 0; h < H; ++h) {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) y[h][r] = _mm256_setzero_ps();
  }
  for (int64_t k = 0; k < g.K; k += g.segment) {
    const int64_t inputs = g.K - k < g.segment ? g.K - k : g.segment;
    __m256i dot[H][R];
#pragma GCC unroll 2
    for (int h = 0; h < H; ++h) {
      const __m256i zeros = _mm256_sub_epi32(load(zero + h * kHalf), bias);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        dot[h][r] = _mm256_mullo_epi32(zeros, _mm256_set1_epi32(x_sum[r]));
      }
    }
    for (int64_t i = 0; i < inputs; i += kInputs) {
      _mm_prefetch(reinterpret_cast<const char*>(weight + kAhead), _MM_HINT_T1);
#pragma GCC unroll 2
      for (int h = 0; h < H; ++h) {
        Products::template add<kBits, R>(dot[h], weight + h * kHalf * 4, x, stride);
      }
      weight += kBlockBytes;
      x += kInputs / 4 * stride;
    }
#pragma GCC unroll 2
    for (int h = 0; h < H; ++h) {
      const __m256 scales = _mm256_loadu_ps(scale + h * kHalf);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const __m256 both = _mm256_mul_ps(scales, _mm256_set1_ps(x_scale[r]));
        y[h][r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[h][r]), both, y[h][r]);
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
#pragma GCC unroll 2
  for (int h = 0; h < H; ++h) {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      _mm256_storeu_ps(g.y + (row + r) * kPanel + half + h * kHalf, y[h][r]);
    }
  }
}

template <class Products, int kBits>
void int8_gemm_rows(const WeightOnlyInt8Gemm& g) {
  using Fn = void(const WeightOnlyInt8Gemm&, int64_t, int64_t);
  static constexpr Fn* kRows[] = {int8_gemm<Products, kBits, 1>, int8_gemm<Products, kBits, 2>,
                                  int8_gemm<Products, kBits, 3>, int8_gemm<Products, kBits, 4>,
                                  int8_gemm<Products, kBits, 5>, int8_gemm<Products, kBits, 6>};
  for (int64_t half = 0; half < kPanel; half += Products::kHalves * kHalf) {
    for (int64_t row = 0; row < g.rows; row += Products::kRows) {
      const int64_t left = g.rows - row;
      kRows[(left < Products::kRows ? left : Products::kRows) - 1](g, row, half);
    }
  }
}

template <class Products>
void int8_gemm(const WeightOnlyInt8Gemm& g) {
  g.bits == 8 ? int8_gemm_rows<Products, 8>(g) : int8_gemm_rows<Products, 4>(g);
}

}  // namespace
}  // namespace llmq
