// int8_gemm with AVX-512 VNNI, with u = w + 128 as panels8 hold it (kernels.h):
//
//     y[m, n] = Σ_g x_scale[m, g] · (Σ_k∈g u[n, k] · x[m, k] + x_offset[m, g])
//               · weight_scale[n] + bias[n]
//
//                 4 inputs of 6 tokens, each broadcast to a register
//                  x0   x1   x2   x3   x4   x5
//     panel n     [ 16 int32 sums a cell, 24 cells, one register each  ]
//     panel n+16  [                                                    ]
//     panel n+32  [   vpdpbusd cell, panel (u8), x (s8): 64 products   ]
//     panel n+48  [                                                    ]
//
// A step reads 256 bytes of weights and 24 of x for 24 vpdpbusd, so from 7 tokens on the multiplier
// (1 a cycle on Zen 4: 473 GOPS measured) is the limit and below it memory (22–25 GB/s measured).
// Sums start at x_offset, so the + 128 costs nothing; wrapping past 2³¹ on the way is harmless.
// With groups, float32 sums stay in the first-level cache.
//
// Reached on one EPYC Genoa core, whole op, ceilings measured between its runs: 4096×4096: M = 1
// 25–27 GB/s where a plain loop reads 19–22, M = 8 91 % of the bandwidth and 76 % of the
// multiplier, M = 16 84 %, M = 64 90 % (groups of 64: 76 %); 11008×4096: M = 64 92 % (78 %), M =
// 1024 94 % (74 %); 576×576, from cache: M = 64 77 % (63 %).
#include <immintrin.h>

#include "kernels.h"

#if !defined(__AVX512VNNI__)
#error "setup.py gives this file its instruction set by its name: _avx512vnni"
#endif

namespace llmq {
namespace {

// What a tile fetches besides the weights that it reads: nothing; what it reads 32 blocks later
// (one tile of tokens: memory is the limit); or its half of the next panels (several tiles: while
// they compute, so that neither memory nor the multiplier waits for the other).
enum class Fetch { none, ahead, next };
// Into the second-level cache, which waits for more lines at once than the first: 20 to 30 % faster
// from memory than fetching into the first, and past a plain loop of loads.
constexpr int64_t kAheadBlocks = 32;
constexpr int64_t kNextLines = 2;  // a block of 4 panels: two tiles fetch the next four panels

__mmask16 tail(int64_t left) {
  return left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
}

__m512i broadcast4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

// sums += 4 products u8 · s8 a lane. Not the intrinsic: around it GCC 12 copies every accumulator
// and keeps 24 of them in memory too.
void dot4(__m512i& sums, __m512i weight, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weight), "v"(x));
}

template <int P, int T>
struct Dots {
  __m512i of[P][T];
};

// Adds `blocks` blocks of P panels × T tokens.
template <Fetch fetch, int P, int T>
[[gnu::always_inline]] inline void add_blocks(Dots<P, T>& dots, const uint8_t* weight,
                                              int64_t panel_bytes, const int8_t* x,
                                              int64_t x_stride, int64_t blocks, int64_t left,
                                              const uint8_t* next) {
  for (int64_t i = 0; i < blocks; ++i) {
    // Behind the end of these panels come the next, of which the first is P - 1 panels further.
    const uint8_t* const ahead =
        weight + kAheadBlocks * kBlockBytes + (left - i > kAheadBlocks ? 0 : (P - 1) * panel_bytes);
    __m512i w[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      w[p] = _mm512_loadu_si512(weight + p * panel_bytes);
      if constexpr (fetch == Fetch::ahead) _mm_prefetch(ahead + p * panel_bytes, _MM_HINT_T1);
    }
    if constexpr (fetch == Fetch::next) {
#pragma GCC unroll 4
      for (int line = 0; line < kNextLines; ++line) {
        _mm_prefetch(next + line * kBlockBytes, _MM_HINT_T1);
      }
      next += kNextLines * kBlockBytes;
    }
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const __m512i a = broadcast4(x + t * x_stride);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) dot4(dots.of[p][t], w[p], a);
    }
    weight += kBlockBytes;
    x += 4;
  }
}

template <Fetch fetch, int P, int T>
void tile(const Int8Gemm& g, int64_t n, int64_t m, const uint8_t* next) {
  const uint8_t* weight = g.weight + n * g.K4 * 4;
  const int64_t panel_bytes = g.K4 * kBlockBytes, group_blocks = g.K4 / g.groups;
  const int8_t* x = g.x + m * g.x_stride;
  __m512 sum[P][T];
  for (int64_t group = 0; group < g.groups; ++group) {
    Dots<P, T> dots;
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const __m512i offset = _mm512_set1_epi32(g.x_offset[(m + t) * g.groups + group]);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) dots.of[p][t] = offset;
    }
    add_blocks<fetch>(dots, weight, panel_bytes, x, g.x_stride, group_blocks,
                      g.K4 - group * group_blocks, next);
    weight += group_blocks * kBlockBytes;
    next += group_blocks * kNextLines * kBlockBytes;
    x += group_blocks * 4;
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const __m512 scale = _mm512_set1_ps(g.x_scale[(m + t) * g.groups + group]);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        const __m512 dot = _mm512_cvtepi32_ps(dots.of[p][t]);
        sum[p][t] = group == 0 ? _mm512_mul_ps(dot, scale) : _mm512_fmadd_ps(dot, scale, sum[p][t]);
      }
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) {
    const int64_t at = n + p * kPanel;
    const __mmask16 mask = tail(g.N - at);
    const __m512 scale = _mm512_maskz_loadu_ps(mask, g.weight_scale + at);
    const __m512 bias =
        g.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, g.bias + at);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      _mm512_mask_storeu_ps(g.y + (m + t) * g.y_stride + at, mask,
                            _mm512_fmadd_ps(sum[p][t], scale, bias));
    }
  }
}

using Tile = void(const Int8Gemm&, int64_t n, int64_t m, const uint8_t* next);
template <Fetch fetch, int P>
constexpr Tile* kTiles[] = {nullptr,           tile<fetch, P, 1>, tile<fetch, P, 2>,
                            tile<fetch, P, 3>, tile<fetch, P, 4>, tile<fetch, P, 5>,
                            tile<fetch, P, 6>};
constexpr int64_t kTokens = 6;

// Two times four panels and the codes of a tile stay within a second-level cache of 1 MiB.
constexpr int64_t kFetchBytes = 384 << 10;

}  // namespace

void int8_gemm_avx512vnni(const Int8Gemm& g) {
  // M tokens in as few tiles as will do, of sizes that differ by at most one.
  const int64_t tiles = ceil_div(g.M, kTokens), panel_bytes = g.K4 * kBlockBytes;
  int64_t n = 0;
  for (; g.N - n > 3 * kPanel; n += 4 * kPanel) {
    const uint8_t* next = g.weight + (n / kPanel + 4) * panel_bytes;
    const bool fetch_next = g.N - n > 7 * kPanel && 4 * panel_bytes <= kFetchBytes;
    for (int64_t i = 0, m = 0; i < tiles; ++i) {
      const int64_t count = (g.M - m) / (tiles - i);
      if (tiles == 1) {
        kTiles<Fetch::ahead, 4>[count](g, n, m, next);
      } else if (fetch_next && i < 2) {
        kTiles<Fetch::next, 4>[count](g, n, m, next + i* kNextLines* panel_bytes);
      } else {
        kTiles<Fetch::none, 4>[count](g, n, m, next);
      }
      m += count;
    }
  }
  for (; n < g.N; n += kPanel) {
    for (int64_t i = 0, m = 0; i < tiles; ++i) {
      const int64_t count = (g.M - m) / (tiles - i);
      kTiles<Fetch::none, 1>[count](g, n, m, nullptr);
      m += count;
    }
  }
}

}  // namespace llmq
