// int8_gemm with AVX-VNNI, on CPUs without AVX-512, with u = w + 128 as panels8 hold it
// (kernels.h):
//
//     y[m, n] = Σ_g x_scale[m, g] · (Σ_k∈g u[n, k] · x[m, k] + x_offset[m, g])
//               · weight_scale[n] + bias[n]
//
// Tile: P panels (2P registers of 8 outputs) × T tokens, 12 sums in registers, 2 weights, 1 input:
// 2 panels × up to 3 tokens, where several streams of weights keep memory busy, or 1 × up to 6. A
// vpdpbusd does 32 products, two a cycle, for which a step of 6 tokens reads 64 bytes of weights
// and 24 of x: 12 vpdpbusd to 8 loads.
//
// Reached on one core of a Xeon with 3.1 GHz (397 GOPS at most) held to AVX-VNNI, whole op:
// 4096×4096: M = 16 319 to 323 GOPS, M = 256 361 to 376; 576×576: M = 256 347 to 373.
#include <immintrin.h>

#include "kernels.h"

#if !defined(__AVXVNNI__) || defined(__AVX512F__)
#error "setup.py gives this file its instruction set by its name: _avxvnni"
#endif

namespace llmq {
namespace {

constexpr int64_t kLanes = 8;
constexpr int64_t kTokens = 6;     // of one panel
constexpr int64_t kFewTokens = 3;  // of two
constexpr int64_t kAhead = 2048;   // bytes between the block in use and the one to fetch

// Lanes below `left` have their top bit set, as masked loads and stores want it.
__m256i lanes_below(int64_t left) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(left < 8 ? left : 8)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// sums += 4 products u8 · s8 a lane. Not the intrinsic, around which GCC 12 moves accumulators to
// memory.
void dot4(__m256i& sums, __m256i weight, __m256i x) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(weight), "x"(x));
}

template <int P, int T>
void tile(const Int8Gemm& g, int64_t n, int64_t m) {
  constexpr int H = 2 * P;
  const int64_t panel_bytes = g.K4 * kBlockBytes, group_blocks = g.K4 / g.groups;
  const uint8_t* weight = g.weight + n / kPanel * panel_bytes;
  const int8_t* x = g.x + m * g.x_stride;
  __m256 sum[H][T];
  for (int64_t group = 0; group < g.groups; ++group) {
    __m256i dot[H][T];
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) {
      const __m256i offset = _mm256_set1_epi32(g.x_offset[(m + t) * g.groups + group]);
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) dot[h][t] = offset;
    }
    for (int64_t i = 0; i < group_blocks; ++i) {
      __m256i w[H];
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) {
        const uint8_t* const block = weight + h / 2 * panel_bytes;
        w[h] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block) + h % 2);
        if (T <= kFewTokens && h % 2 == 0) {
          _mm_prefetch(reinterpret_cast<const char*>(block) + kAhead, _MM_HINT_T1);
        }
      }
#pragma GCC unroll 6
      for (int t = 0; t < T; ++t) {
        int32_t four;
        __builtin_memcpy(&four, x + t * g.x_stride, 4);
        const __m256i input = _mm256_set1_epi32(four);
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) dot4(dot[h][t], w[h], input);
      }
      weight += kBlockBytes;
      x += 4;
    }
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) {
      const __m256 scale = _mm256_set1_ps(g.x_scale[(m + t) * g.groups + group]);
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) {
        const __m256 exact = _mm256_cvtepi32_ps(dot[h][t]);
        sum[h][t] =
            group == 0 ? _mm256_mul_ps(exact, scale) : _mm256_fmadd_ps(exact, scale, sum[h][t]);
      }
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h) {
    const int64_t at = n + h * kLanes;
    if (at >= g.N) break;
    const __m256i mask = lanes_below(g.N - at);
    const __m256 scale = _mm256_maskload_ps(g.weight_scale + at, mask);
    const __m256 bias =
        g.bias == nullptr ? _mm256_setzero_ps() : _mm256_maskload_ps(g.bias + at, mask);
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) {
      float* const y = g.y + (m + t) * g.y_stride + at;
      _mm256_maskstore_ps(y, mask, _mm256_fmadd_ps(sum[h][t], scale, bias));
    }
  }
}

using Tile = void(const Int8Gemm&, int64_t n, int64_t m);
constexpr Tile* kOnePanel[kTokens + 1] = {nullptr,    tile<1, 1>, tile<1, 2>, tile<1, 3>,
                                          tile<1, 4>, tile<1, 5>, tile<1, 6>};
constexpr Tile* kTwoPanels[kFewTokens + 1] = {nullptr, tile<2, 1>, tile<2, 2>, tile<2, 3>};

}  // namespace

void int8_gemm_avxvnni(const Int8Gemm& g) {
  int64_t n = 0;
  if (g.M <= kFewTokens) {
    for (; g.N - n > kPanel; n += 2 * kPanel) kTwoPanels[g.M](g, n, 0);
  }
  // M tokens in as few tiles as will do, of sizes that differ by at most one.
  const int64_t tiles = ceil_div(g.M, kTokens);
  for (; n < g.N; n += kPanel) {
    for (int64_t i = 0, m = 0; i < tiles; ++i) {
      const int64_t count = (g.M - m) / (tiles - i);
      kOnePanel[count](g, n, m);
      m += count;
    }
  }
}

}  // namespace llmq
