// bitmap_gemm and bitmap_expand with AVX-512 VBMI2, over the bitmap panels of kernels.h:
//
//     y[m, n] = Σ_g x_scale[m, g] · (Σ_k∈g u[n, k] · x[m, k] + x_offset[m, g])
//               · weight_scale[n] + bias[n],   u = 128, code 0, where no byte was kept
//
// A block's mask of 64 bits is a mask register: one vpexpandb puts the kept bytes to their places
// and 128 elsewhere, and one popcount says where the next block begins. Tile: 1 panel × up to 12
// tokens, one sum a register, a vpdpbusd for 16 outputs × 4 inputs. Bound by memory for few tokens,
// by vpdpbusd for many.
//
// Reached on one core, whole op, 4096×4096 at 50 %, 10.5 MB with the masks
// (benchmarks/results/*/peers_1_threads.json):
//
//                   M = 1 (int8_gemm)    read                 M = 16       M = 256
//     EPYC Genoa    724 us (867)         14.5 of 24.0 GB/s    236 GOPS     400 of 470 GOPS
//     Xeon          800 us (1147)        13.1 of 15.3 GB/s    323 GOPS     529 of 885 GOPS
//
// More than 12 tokens run int8_gemm on what bitmap_expand writes.
#include <immintrin.h>

#include "kernels.h"

#if !defined(__AVX512VNNI__) || !defined(__AVX512VBMI2__)
#error "setup.py gives this file its instruction set by its name: _avx512vnni"
#endif

namespace llmq {
namespace {

// How far ahead masks and kept bytes are fetched: addresses depend on the popcounts before.
constexpr int64_t kAhead = 4096, kMaskAhead = 1024;

constexpr int64_t kTokens = 12;

// vpdpbusd has a latency of 4 cycles: few tokens take several blocks at a time, one chain each.
constexpr int chains(int tokens) { return tokens == 1 ? 4 : tokens <= 3 ? 2 : 1; }

// The next block of 64 bytes; moves `weight` behind its kept bytes.
__m512i next_block(const uint8_t*& weight, const uint8_t* mask) {
  uint64_t bits;
  __builtin_memcpy(&bits, mask, 8);
  __m512i kept = _mm512_loadu_si512(weight);
  asm("" : "+v"(kept));  // vpexpandb from memory is microcoded on AMD, and GCC would fold the load
  weight += _mm_popcnt_u64(bits);
  _mm_prefetch(reinterpret_cast<const char*>(weight) + kAhead, _MM_HINT_T1);
  return _mm512_mask_expand_epi8(_mm512_set1_epi8(static_cast<char>(0x80)), _cvtu64_mask64(bits),
                                 kept);
}

// sums += 4 products u8 · s8 a lane, with the 4 inputs at x broadcast. int8_gemm says why assembly.
void dot4(__m512i& sums, __m512i weight, const int8_t* x) {
  using Four = const int8_t[4];
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(weight), "m"(*reinterpret_cast<Four*>(x)));
}

template <int T>
void tile(const Int8Gemm& g, const uint8_t* weight, const uint8_t* mask, int64_t n, int64_t m) {
  constexpr int kChains = chains(T);
  const int64_t group_blocks = g.K4 / g.groups;
  const int8_t* x = g.x + m * g.x_stride;
  __m512 sum[T];
  for (int t = 0; t < T; ++t) sum[t] = _mm512_setzero_ps();
  for (int64_t group = 0; group < g.groups; ++group) {
    __m512i dot[kChains][T];
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
      dot[0][t] = _mm512_set1_epi32(g.x_offset[(m + t) * g.groups + group]);
#pragma GCC unroll 4
      for (int c = 1; c < kChains; ++c) dot[c][t] = _mm512_setzero_si512();
    }
    int64_t i = 0;
    for (; i + 4 <= group_blocks; i += 4) {
      _mm_prefetch(reinterpret_cast<const char*>(mask) + kMaskAhead, _MM_HINT_T1);
#pragma GCC unroll 4
      for (int b = 0; b < 4; ++b) {
        const __m512i w = next_block(weight, mask + 8 * b);
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) dot4(dot[b % kChains][t], w, x + t * g.x_stride + 4 * b);
      }
      mask += 32;
      x += 16;
    }
    for (; i < group_blocks; ++i) {
      const __m512i w = next_block(weight, mask);
#pragma GCC unroll 12
      for (int t = 0; t < T; ++t) dot4(dot[0][t], w, x + t * g.x_stride);
      mask += 8;
      x += 4;
    }
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
      for (int c = 1; c < kChains; ++c) dot[0][t] = _mm512_add_epi32(dot[0][t], dot[c][t]);
      const __m512 scale = _mm512_set1_ps(g.x_scale[(m + t) * g.groups + group]);
      sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[0][t]), scale, sum[t]);
    }
  }
  const int64_t left = g.N - n;
  const __mmask16 lanes = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
  const __m512 scale = _mm512_maskz_loadu_ps(lanes, g.weight_scale + n);
  const __m512 bias =
      g.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(lanes, g.bias + n);
  for (int t = 0; t < T; ++t)
    _mm512_mask_storeu_ps(g.y + (m + t) * g.y_stride + n, lanes,
                          _mm512_fmadd_ps(sum[t], scale, bias));
}

using Tile = void(const Int8Gemm&, const uint8_t* weight, const uint8_t* mask, int64_t n,
                  int64_t m);
constexpr Tile* kTiles[kTokens] = {tile<1>, tile<2>, tile<3>, tile<4>,  tile<5>,  tile<6>,
                                   tile<7>, tile<8>, tile<9>, tile<10>, tile<11>, tile<12>};

}  // namespace

void bitmap_gemm_avx512vnni(const BitmapGemm& b) {
  const Int8Gemm& g = b.dense;
  for (int64_t n = 0; n < g.N; n += kPanel) {
    const int64_t p = n / kPanel, tiles = ceil_div(g.M, kTokens);
    for (int64_t i = 0; i < tiles; ++i) {  // as even as can be: 13 tokens are 6 and 7
      const int64_t m = i * g.M / tiles, count = (i + 1) * g.M / tiles - m;
      kTiles[count - 1](g, g.weight + b.start[p], b.mask + p * g.K4 * 8, n, m);
    }
  }
}

void bitmap_expand_avx512vnni(const BitmapExpand& e) {
  const uint8_t* weight = e.weight;
  for (int64_t i = 0; i < e.blocks; ++i) {
    _mm_prefetch(reinterpret_cast<const char*>(e.mask + 8 * i) + kMaskAhead, _MM_HINT_T1);
    _mm512_storeu_si512(e.panels + i * kBlockBytes, next_block(weight, e.mask + 8 * i));
  }
}

}  // namespace llmq
