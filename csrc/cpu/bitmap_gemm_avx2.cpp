// bitmap_gemm and bitmap_expand with AVX2, over the bitmap panels of kernels.h:
//
//     y[m, n] = Σ_g x_scale[m, g] · (Σ_k∈g w[n, k] · x[m, k]) · weight_scale[n] + bias[n]
//
// 8 bytes of a block at a time: a table of 256 masks says which kept byte belongs where, and
// vpshufb puts it there; the kept bytes are made signed before, so that an absent one is 0:
//
//     mask, from bit 0     1  1  0  1  0  0  1  0
//     kept bytes           a  b  c  d
//     table[mask]          0  1  80 2  80 80 3  80
//     codes                a  b  0  c  0  0  d  0
//
// Popcounts of the mask say where the bytes of each 8 bits begin. Tile: 1 panel × up to 4 tokens, 8
// sums in registers; products as in int8_gemm_avx2.cpp. Bound by expanding for few tokens, which
// share it, and by multiplying for many.
//
// Reached on one core, whole op, 4096×4096 at 50 %, 10.5 MB with the masks
// (benchmarks/results/*/peers_1_threads.json): an EPYC Genoa M = 1 2.5 ms, 4 of 27 GB/s, M = 256
// 117 GOPS on what bitmap_expand writes; a Xeon M = 1 2.0 ms, M = 256 107 GOPS.
#include <immintrin.h>

#include "kernels.h"

#if !defined(__AVX2__) || !defined(__FMA__) || defined(__AVX512F__)
#error "setup.py gives this file its instruction set by its name: _avx2"
#endif

namespace llmq {
namespace {

// How far ahead masks and kept bytes are fetched: addresses depend on the popcounts before.
constexpr int64_t kAhead = 1024;

constexpr int64_t kTokens = 4;

// Byte i of an entry says which of the kept bytes in its half of a register belongs at i, or 0x80
// for none; the lower 8 take from the first 8 bytes of the register, the upper 8 from the second.
struct Table {
  uint64_t lower[256], upper[256];
};

constexpr Table make_table() {
  Table table{};
  for (int mask = 0; mask < 256; ++mask) {
    uint64_t next = 0;
    for (int i = 0; i < 8; ++i) {
      const bool kept = (mask >> i & 1) != 0;
      table.lower[mask] |= (kept ? next : 0x80) << (8 * i);
      table.upper[mask] |= (kept ? next + 8 : 0x80) << (8 * i);
      next += kept;
    }
  }
  return table;
}

alignas(64) constexpr Table kTable = make_table();

__m128i two_halves(const void* low, const void* high) {
  const __m128i half = _mm_loadl_epi64(static_cast<const __m128i*>(low));
  return _mm_castpd_si128(_mm_loadh_pd(_mm_castsi128_pd(half), static_cast<const double*>(high)));
}

// The next 32 signed codes, 0 where absent; moves `weight` behind their kept bytes.
__m256i next_codes(const uint8_t*& weight, uint32_t bits) {
  const uint8_t* const second = weight + _mm_popcnt_u32(bits & 0xff);
  const uint8_t* const third = weight + _mm_popcnt_u32(bits & 0xffff);
  const uint8_t* const fourth = weight + _mm_popcnt_u32(bits & 0xffffff);
  const __m256i kept = _mm256_set_m128i(two_halves(third, fourth), two_halves(weight, second));
  weight += _mm_popcnt_u32(bits);
  const __m256i places =
      _mm256_set_m128i(two_halves(&kTable.lower[bits >> 16 & 255], &kTable.upper[bits >> 24]),
                       two_halves(&kTable.lower[bits & 255], &kTable.upper[bits >> 8 & 255]));
  const __m256i flip = _mm256_set1_epi8(static_cast<char>(0x80));
  return _mm256_shuffle_epi8(_mm256_xor_si256(kept, flip), places);
}

struct Block {
  __m256i half[2];  // lanes 0 … 7 and 8 … 15
};

Block next_block(const uint8_t*& weight, const uint8_t* mask) {
  uint32_t bits[2];
  __builtin_memcpy(bits, mask, 8);
  Block block;
  for (int h = 0; h < 2; ++h) block.half[h] = next_codes(weight, bits[h]);
  _mm_prefetch(reinterpret_cast<const char*>(mask) + kAhead, _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(weight) + kAhead, _MM_HINT_T0);
  return block;
}

__m256i broadcast4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

// Lanes below `left` have their top bit set, as masked loads and stores want it.
__m256i lanes_below(int64_t left) {
  const int count = left < 0 ? 0 : left < 8 ? static_cast<int>(left) : 8;
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

template <int T>
void tile(const Int8Gemm& g, const uint8_t* weight, const uint8_t* mask, int64_t n, int64_t m) {
  const int64_t group_blocks = g.K4 / g.groups;
  const __m256i ones = _mm256_set1_epi16(1);
  const int8_t* x = g.x + m * g.x_stride;
  __m256 sum[2][T];
  for (int t = 0; t < T; ++t) sum[0][t] = sum[1][t] = _mm256_setzero_ps();
  for (int64_t group = 0; group < g.groups; ++group) {
    __m256i dot[2][T];
    for (int t = 0; t < T; ++t) dot[0][t] = dot[1][t] = _mm256_setzero_si256();
    for (int64_t i = 0; i < group_blocks; ++i, mask += 8, x += 4) {
      const Block block = next_block(weight, mask);
      for (int h = 0; h < 2; ++h) {
        const __m256i w = block.half[h], magnitude = _mm256_abs_epi8(w);
        for (int t = 0; t < T; ++t) {
          const __m256i signed_x = _mm256_sign_epi8(broadcast4(x + t * g.x_stride), w);
          const __m256i pairs = _mm256_maddubs_epi16(magnitude, signed_x);
          dot[h][t] = _mm256_add_epi32(dot[h][t], _mm256_madd_epi16(pairs, ones));
        }
      }
    }
    for (int t = 0; t < T; ++t) {
      const __m256 scale = _mm256_set1_ps(g.x_scale[(m + t) * g.groups + group]);
      for (int h = 0; h < 2; ++h)
        sum[h][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[h][t]), scale, sum[h][t]);
    }
  }
  for (int h = 0; h < 2 && n < g.N; ++h, n += 8) {
    const __m256i lanes = lanes_below(g.N - n);
    const __m256 scale = _mm256_maskload_ps(g.weight_scale + n, lanes);
    const __m256 bias =
        g.bias == nullptr ? _mm256_setzero_ps() : _mm256_maskload_ps(g.bias + n, lanes);
    for (int t = 0; t < T; ++t)
      _mm256_maskstore_ps(g.y + (m + t) * g.y_stride + n, lanes,
                          _mm256_fmadd_ps(sum[h][t], scale, bias));
  }
}

using Tile = void(const Int8Gemm&, const uint8_t* weight, const uint8_t* mask, int64_t n,
                  int64_t m);
constexpr Tile* kTiles[kTokens] = {tile<1>, tile<2>, tile<3>, tile<4>};

}  // namespace

void bitmap_gemm_avx2(const BitmapGemm& b) {
  const Int8Gemm& g = b.dense;
  for (int64_t n = 0; n < g.N; n += kPanel) {
    const int64_t p = n / kPanel;
    for (int64_t m = 0; m < g.M; m += kTokens) {
      const int64_t count = g.M - m < kTokens ? g.M - m : kTokens;
      kTiles[count - 1](g, g.weight + b.start[p], b.mask + p * g.K4 * 8, n, m);
    }
  }
}

void bitmap_expand_avx2(const BitmapExpand& e) {
  const __m256i flip = _mm256_set1_epi8(static_cast<char>(0x80));
  const uint8_t* weight = e.weight;
  for (int64_t i = 0; i < e.blocks; ++i) {
    const Block block = next_block(weight, e.mask + 8 * i);
    auto* const out = reinterpret_cast<__m256i*>(e.panels + i * kBlockBytes);
    _mm256_storeu_si256(out, _mm256_xor_si256(block.half[0], flip));
    _mm256_storeu_si256(out + 1, _mm256_xor_si256(block.half[1], flip));
  }
}

}  // namespace llmq
