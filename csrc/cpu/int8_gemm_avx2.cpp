// int8_gemm with AVX2: y[m, n] = Σ_g x_scale[m, g] · (Σ_k∈g w[n, k] · x[m, k]) · weight_scale[n]
// + bias[n], exact.
//
// vpmaddubsw multiplies u8 by s8 and saturates its 16-bit sums of two, so the stored u = w + 128
// will not do: |w| · sign(x, w) has the same products, at most 128·127·2 < 2¹⁵ a pair, and no
// correction. Tile: half a panel (8 outputs) × up to 6 tokens, or a panel × up to 2; four instructions
// (sign, multiply, widen, add) a token where VNNI needs one, which bounds it.
// Reached on one EPYC Genoa core, whole op: 4096×4096: M = 1 930 us (15 to 18 of 20 to 25 GB/s that it
// reads; half panels without fetching ahead took 1,400 us), M = 256 83 GOPS, 1.4 times torch's
// float32 (which uses AVX-512 there); 576×576: M = 1 18 us to its 44.
// Tried: both sides widened to 16 bits, whose vpmaddwd needs neither sign nor vpmaddubsw, 5 tokens a
// tile: 85 to 92 GOPS at M = 256 where this reached 137 to 140 in the same run.
#include <immintrin.h>

#include "kernels.h"

#if !defined(__AVX2__) || !defined(__FMA__) || defined(__AVX512F__)
#error "setup.py gives this file its instruction set by its name: _avx2"
#endif

namespace llmq {
namespace {

constexpr int64_t kLanes = 8;
constexpr int64_t kTokens = 6;       // of half a panel
constexpr int64_t kPanelTokens = 2;  // of a whole one
constexpr int64_t kAhead = 4096;     // bytes between the block in use and the one to fetch

__m256i broadcast4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

// Lanes below `left` have their top bit set, as masked loads and stores want it.
__m256i lanes_below(int64_t left) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(left < 8 ? left : 8)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// H halves of a panel × T tokens. Both halves at once read each line of weights once, which is what
// counts for few tokens; more tokens take the registers instead.
template <int H, int T>
void tile(const Int8Gemm& g, int64_t n, int64_t m) {
  const uint8_t* weight = g.weight + n / kPanel * g.K4 * kBlockBytes + n % kPanel * 4;
  const int64_t group_blocks = g.K4 / g.groups;
  const int8_t* x = g.x + m * g.x_stride;
  const __m256i flip = _mm256_set1_epi8(static_cast<char>(0x80)), ones = _mm256_set1_epi16(1);
  __m256 sum[H][T];
#pragma GCC unroll 2
  for (int h = 0; h < H; ++h) {
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) sum[h][t] = _mm256_setzero_ps();
  }
  for (int64_t group = 0; group < g.groups; ++group) {
    __m256i dot[H][T];
#pragma GCC unroll 2
    for (int h = 0; h < H; ++h) {
#pragma GCC unroll 6
      for (int t = 0; t < T; ++t) dot[h][t] = _mm256_setzero_si256();
    }
    for (int64_t i = 0; i < group_blocks; ++i) {
      if constexpr (H == 2) {
        _mm_prefetch(reinterpret_cast<const char*>(weight) + kAhead, _MM_HINT_T1);
      }
#pragma GCC unroll 2
      for (int h = 0; h < H; ++h) {
        const auto* block = reinterpret_cast<const __m256i*>(weight) + h;
        const __m256i w = _mm256_xor_si256(_mm256_loadu_si256(block), flip);
        const __m256i magnitude = _mm256_abs_epi8(w);
#pragma GCC unroll 6
        for (int t = 0; t < T; ++t) {
          const __m256i signed_x = _mm256_sign_epi8(broadcast4(x + t * g.x_stride), w);
          const __m256i pairs = _mm256_maddubs_epi16(magnitude, signed_x);
          dot[h][t] = _mm256_add_epi32(dot[h][t], _mm256_madd_epi16(pairs, ones));
        }
      }
      weight += kBlockBytes;
      x += 4;
    }
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) {
      const __m256 scale = _mm256_set1_ps(g.x_scale[(m + t) * g.groups + group]);
#pragma GCC unroll 2
      for (int h = 0; h < H; ++h) {
        sum[h][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[h][t]), scale, sum[h][t]);
      }
    }
  }
#pragma GCC unroll 2
  for (int h = 0; h < H; ++h) {
    const int64_t at = n + h * kLanes;
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
constexpr Tile* kHalves[] = {nullptr,    tile<1, 1>, tile<1, 2>, tile<1, 3>,
                             tile<1, 4>, tile<1, 5>, tile<1, 6>};
constexpr Tile* kPanels[kPanelTokens + 1] = {nullptr, tile<2, 1>, tile<2, 2>};

}  // namespace

void int8_gemm_avx2(const Int8Gemm& g) {
  if (g.M <= kPanelTokens) {
    for (int64_t n = 0; n < g.N; n += kPanel) {
      (g.N - n > kLanes ? kPanels : kHalves)[g.M](g, n, 0);
    }
    return;
  }
  for (int64_t n = 0; n < g.N; n += kLanes) {
    for (int64_t m = 0; m < g.M; m += kTokens) {
      kHalves[g.M - m < kTokens ? g.M - m : kTokens](g, n, m);
    }
  }
}

}  // namespace llmq
