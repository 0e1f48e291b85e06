// int8_gemm with AVX2: y[m, n] = Σ_g x_scale[m, g] · (Σ_k∈g w[n, k] · x[m, k]) · weight_scale[n]
// + bias[n], exact.
//
// vpmaddubsw multiplies u8 by s8 and saturates its 16-bit sums of two, so the stored u = w + 128
// will not do. |w| · sign(x, w) has the same products, at most 128·127·2 < 2¹⁵ a pair, and no
// correction; that serves few tokens. For more, x ^ s, where s is −1 for negative w and 0 else,
// costs one of three or four ports where vpsignb takes one of the two that multiply; as x ^ −1 is
// −x − 1, the sum is too small by Σ_{w<0} |w|, which is counted once a block:
//
//     Σ w · x = Σ |w| · (x ^ s) − Σ |w| · s
//
// Tile: half a panel (8 outputs) × up to 8 tokens, or a panel × up to 2. Four instructions (flip,
// multiply, widen, add) a token where VNNI needs one: on three ports at most 48 operations a cycle.
// Torch's dynamic int8, which quantizes x to 7 bits, needs no flip: 64.
//
// Reached on one core of a Xeon with 3.1 GHz (149 GOPS at most), whole op, 4096×4096: M = 16 108 to
// 119, M = 256 105 to 113 (with vpsignb 99 to 108); an EPYC Genoa did 138 with vpsignb, and M = 1
// in 930 us (15 to 18 of the 20 to 25 GB/s that it reads).
//
// Tried: both sides widened to 16 bits, whose vpmaddwd needs neither sign nor vpmaddubsw, 5 tokens
// a tile: 85 to 92 GOPS at M = 256 where vpsignb reached 137 to 140 in the same run.
#include <immintrin.h>

#include "kernels.h"

#if !defined(__AVX2__) || !defined(__FMA__) || defined(__AVX512F__)
#error "setup.py gives this file its instruction set by its name: _avx2"
#endif

namespace llmq {
namespace {

constexpr int64_t kLanes = 8;
constexpr int64_t kTokens = 8;       // of half a panel
constexpr int64_t kPanelTokens = 2;  // of a whole one
constexpr int64_t kAhead = 4096;     // bytes between the block in use and the one to fetch

int32_t four(const int8_t* x) {
  int32_t bytes;
  __builtin_memcpy(&bytes, x, 4);
  return bytes;
}

// dot += |w| · (x ^ negative), 4 products a lane. Not intrinsics: around them GCC 12 keeps more
// than a few accumulators in memory.
void add_flipped(__m256i& dot, __m256i magnitude, __m256i negative, __m256i ones, const int8_t* x) {
  __m256i product;
  asm("vpbroadcastd %[x], %[p]\n\t"
      "vpxor %[n], %[p], %[p]\n\t"
      "vpmaddubsw %[p], %[w], %[p]\n\t"
      "vpmaddwd %[ones], %[p], %[p]\n\t"
      "vpaddd %[p], %[dot], %[dot]"
      : [dot] "+x"(dot), [p] "=&x"(product)
      : [x] "m"(*reinterpret_cast<const int32_t*>(x)), [n] "x"(negative), [w] "x"(magnitude),
        [ones] "x"(ones));
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
  constexpr bool kFlips = T > kPanelTokens;  // pays for itself from three tokens on
  const uint8_t* weight = g.weight + n / kPanel * g.K4 * kBlockBytes + n % kPanel * 4;
  const int64_t group_blocks = g.K4 / g.groups;
  const int8_t* x = g.x + m * g.x_stride;
  const __m256i top = _mm256_set1_epi8(static_cast<char>(0x80)), ones = _mm256_set1_epi16(1);
  __m256 sum[H][T];
  for (int64_t group = 0; group < g.groups; ++group) {
    __m256i dot[H][T], flipped = _mm256_setzero_si256();
#pragma GCC unroll 2
    for (int h = 0; h < H; ++h) {
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) dot[h][t] = _mm256_setzero_si256();
    }
    for (int64_t i = 0; i < group_blocks; ++i) {
      if constexpr (H == 2) {
        _mm_prefetch(reinterpret_cast<const char*>(weight) + kAhead, _MM_HINT_T1);
      }
#pragma GCC unroll 2
      for (int h = 0; h < H; ++h) {
        const auto* block = reinterpret_cast<const __m256i*>(weight) + h;
        const __m256i w = _mm256_xor_si256(_mm256_loadu_si256(block), top);
        const __m256i magnitude = _mm256_abs_epi8(w);
        if constexpr (kFlips) {
          const __m256i negative = _mm256_cmpgt_epi8(_mm256_setzero_si256(), w);
          const __m256i pairs = _mm256_maddubs_epi16(magnitude, negative);
          flipped = _mm256_add_epi32(flipped, _mm256_madd_epi16(pairs, ones));
#pragma GCC unroll 8
          for (int t = 0; t < T; ++t) {
            add_flipped(dot[h][t], magnitude, negative, ones, x + t * g.x_stride);
          }
        } else {
#pragma GCC unroll 2
          for (int t = 0; t < T; ++t) {
            const __m256i input = _mm256_set1_epi32(four(x + t * g.x_stride));
            const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(input, w));
            dot[h][t] = _mm256_add_epi32(dot[h][t], _mm256_madd_epi16(pairs, ones));
          }
        }
      }
      weight += kBlockBytes;
      x += 4;
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const __m256 scale = _mm256_set1_ps(g.x_scale[(m + t) * g.groups + group]);
#pragma GCC unroll 2
      for (int h = 0; h < H; ++h) {
        const __m256 exact = _mm256_cvtepi32_ps(_mm256_sub_epi32(dot[h][t], flipped));
        sum[h][t] =
            group == 0 ? _mm256_mul_ps(exact, scale) : _mm256_fmadd_ps(exact, scale, sum[h][t]);
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
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      float* const y = g.y + (m + t) * g.y_stride + at;
      _mm256_maskstore_ps(y, mask, _mm256_fmadd_ps(sum[h][t], scale, bias));
    }
  }
}

using Tile = void(const Int8Gemm&, int64_t n, int64_t m);
constexpr Tile* kHalves[kTokens + 1] = {nullptr,    tile<1, 1>, tile<1, 2>, tile<1, 3>, tile<1, 4>,
                                        tile<1, 5>, tile<1, 6>, tile<1, 7>, tile<1, 8>};
constexpr Tile* kPanels[kPanelTokens + 1] = {nullptr, tile<2, 1>, tile<2, 2>};

}  // namespace

void int8_gemm_avx2(const Int8Gemm& g) {
  if (g.M <= kPanelTokens) {
    for (int64_t n = 0; n < g.N; n += kPanel) {
      (g.N - n > kLanes ? kPanels : kHalves)[g.M](g, n, 0);
    }
    return;
  }
  // M tokens in as few tiles as will do, of sizes that differ by at most one.
  const int64_t tiles = ceil_div(g.M, kTokens);
  for (int64_t n = 0; n < g.N; n += kLanes) {
    for (int64_t i = 0, m = 0; i < tiles; ++i) {
      const int64_t count = (g.M - m) / (tiles - i);
      kHalves[count](g, n, m);
      m += count;
    }
  }
}

}  // namespace llmq
