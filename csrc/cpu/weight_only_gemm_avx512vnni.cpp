// weight_only_linear on AVX-512-VNNI: y = Σ_segments scale · x_scale · Σ_k (w − zero) · x in int32.
//
// Tile: 1 panel × up to 12 rows, one int32 accumulator a row; a 64-byte block of the panel is
// loaded once and multiplied with a broadcast of 4 inputs a row (vpdpbusd, u8 weights × s8
// activations). Nibbles are operands as they are: low = inputs 8i … 8i+3, high = inputs 8i+4 …
// 8i+7. The zero point is exact: an accumulator starts at −zero · Σ codes.
//
// Float activations come as three int8 digits, three rows a token (split_rows): 24 bits relative to
// the largest input of the segment, as precise as float32 accumulation, for 3 vpdpbusd a block
// where floats need 4 (bits 8) or 8 (bits 4) times a shift, a conversion and an FMA.
//
// Bound by memory for one token, by vpdpbusd for many. Reached on one core, whole op, 4096×4096
// (benchmarks/results/*/peers_1_threads.json), 4 bits in groups of 32, 11.0 MB with scales and zero
// points, and 8 bits, 16.8 MB; GOPS of float activations count one product where three are made:
//
//                              M = 1                     M = 16       M = 256
//     EPYC Genoa   w4a8        784 us, 14 of 24 GB/s     232 GOPS     268 of 470 GOPS
//                  w4a16       749 us, 15 of 24 GB/s      90           94 of 157
//                  w8a16      1115 us, 15 of 24 GB/s     109          119 of 157
//     Xeon         w4a8       1004 us, 11 of 15 GB/s     274          300 of 885
//                  w4a16      1007 us, 11 of 15 GB/s      98           86 of 295
//                  w8a16      1480 us, 11 of 15 GB/s     132          118 of 295
#include <immintrin.h>

#include "kernels.h"

namespace llmq {
namespace {

// Bytes between the block in use and the one to fetch, into the second-level cache: it waits for
// more lines at once than the first, and one stream must have some 50 under way.
constexpr int64_t kAhead = 8192;

// What max|x| becomes: 127 below the largest sum of three digits, so that rounding cannot pass it.
constexpr float kTop = 0x7f7f00;

__m512i broadcast4(const int8_t* x) {
  return _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(x));
}

// sums += 4 products u8 · s8 a lane. Not the intrinsic: around it GCC 12 copies the accumulators.
void dot4(__m512i& sums, __m512i weight, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weight), "v"(x));
}

// vpdpbusd has a latency of 4 cycles: few rows take several blocks at a time, one chain each.
constexpr int chains(int rows) { return rows <= 2 ? 4 : rows <= 4 ? 2 : 1; }

template <int kRows>
struct Dots {
  __m512i of[chains(kRows)][kRows];
};

template <int kBits, int kRows, int kBlocks>
[[gnu::always_inline]] inline void multiply(Dots<kRows>& dots, const uint8_t* weight,
                                            const int8_t* x) {
  const __m512i low_nibbles = _mm512_set1_epi8(15);
  constexpr int kChains = chains(kRows);
#pragma GCC unroll 4
  for (int b = 0; b < kBlocks; ++b) {
    const __m512i block = _mm512_loadu_si512(weight + b * kBlockBytes);
    _mm_prefetch(reinterpret_cast<const char*>(weight + b * kBlockBytes + kAhead), _MM_HINT_T1);
    if constexpr (kBits == 8) {
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        dot4(dots.of[b % kChains][r], block, broadcast4(x + (b * kRows + r) * 4));
      }
    } else {
      const __m512i low = _mm512_and_si512(block, low_nibbles);
      const __m512i high = _mm512_and_si512(_mm512_srli_epi16(block, 4), low_nibbles);
      const int8_t* const inputs = x + b * kRows * 8;
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        dot4(dots.of[2 * b % kChains][r], low, broadcast4(inputs + r * 4));
      }
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        dot4(dots.of[(2 * b + 1) % kChains][r], high, broadcast4(inputs + (kRows + r) * 4));
      }
    }
  }
}

template <int kBits, int kRows>
void gemm(const WeightOnlyInt8Gemm& g) {
  constexpr int kInputs = 32 / kBits;  // a block
  constexpr int kChains = chains(kRows);
  constexpr int kUnroll = kRows <= 4 ? 4 : 1;  // a group of 32 inputs at 4 bits
  const uint8_t* weight = g.weight;
  const int8_t* x = g.x;
  const float* x_scale = g.x_scale;
  const int32_t* x_sum = g.x_sum;
  const float* scale = g.scale;
  const int32_t* zero = g.zero;
  int64_t left_in_group = g.segments_per_group;
  __m512 y[kRows];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) y[r] = _mm512_setzero_ps();

  for (int64_t k = 0; k < g.K; k += g.segment) {
    const int64_t inputs = g.K - k < g.segment ? g.K - k : g.segment;
    int64_t blocks = ceil_div(inputs, kInputs);
    const __m512i zeros = _mm512_loadu_si512(zero);
    Dots<kRows> dots;
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      dots.of[0][r] = _mm512_mullo_epi32(zeros, _mm512_set1_epi32(x_sum[r]));
#pragma GCC unroll 4
      for (int c = 1; c < kChains; ++c) dots.of[c][r] = _mm512_setzero_si512();
    }
    for (; blocks >= kUnroll; blocks -= kUnroll) {
      multiply<kBits, kRows, kUnroll>(dots, weight, x);
      weight += kUnroll * kBlockBytes;
      x += kUnroll * kInputs * kRows;
    }
    for (; kUnroll > 1 && blocks > 0; --blocks) {
      multiply<kBits, kRows, 1>(dots, weight, x);
      weight += kBlockBytes;
      x += kInputs * kRows;
    }
    const __m512 scales = _mm512_loadu_ps(scale);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      __m512i dot = dots.of[0][r];
#pragma GCC unroll 4
      for (int c = 1; c < kChains; ++c) dot = _mm512_add_epi32(dot, dots.of[c][r]);
      const __m512 both = _mm512_mul_ps(scales, _mm512_set1_ps(x_scale[r]));
      y[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), both, y[r]);
    }
    x_scale += kRows;
    x_sum += kRows;
    if (--left_in_group == 0) {
      scale += kPanel;
      zero += kPanel;
      if (g.next_scale != nullptr) {  // otherwise each panel starts by waiting for memory
        const int64_t i = scale - g.scale;
        _mm_prefetch(reinterpret_cast<const char*>(g.next_scale + i), _MM_HINT_T0);
        if (g.next_zero != nullptr && i % 64 == 0) {
          _mm_prefetch(reinterpret_cast<const char*>(g.next_zero + i), _MM_HINT_T0);
        }
      }
      left_in_group = g.segments_per_group;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) _mm512_storeu_ps(g.y + r * kPanel, y[r]);
}

template <int kBits>
void gemm_rows(const WeightOnlyInt8Gemm& g) {
  using Fn = void(const WeightOnlyInt8Gemm&);
  static constexpr Fn* kRows[kTile] = {gemm<kBits, 1>,  gemm<kBits, 2>,  gemm<kBits, 3>,
                                       gemm<kBits, 4>,  gemm<kBits, 5>,  gemm<kBits, 6>,
                                       gemm<kBits, 7>,  gemm<kBits, 8>,  gemm<kBits, 9>,
                                       gemm<kBits, 10>, gemm<kBits, 11>, gemm<kBits, 12>};
  kRows[g.rows - 1](g);
}

__mmask16 first(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1);
}

// 16 registers of 16 words become 16 of the columns: two rounds in pairs, two by 128-bit quarters.
void transpose(__m512i (&rows)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

}  // namespace

void weight_only_int8_gemm_avx512vnni(const WeightOnlyInt8Gemm& g) {
  g.bits == 8 ? gemm_rows<8>(g) : gemm_rows<4>(g);
}

void panel_scales_avx512vnni(const PanelScales& p) {
  const int32_t stored_zero = p.bits == 8 ? 128 : p.zero_point == nullptr ? 8 : 0;
  const __m512i offset = _mm512_set1_epi32(stored_zero);
  if (p.scale == nullptr) {
    for (int64_t i = 0; i < p.groups * kPanel; i += 16) {
      __m512i zero = _mm512_setzero_si512();
      if (p.zero_point != nullptr) {
        const auto* const sixteen = reinterpret_cast<const __m128i*>(p.zero_point + i);
        zero = _mm512_cvtepi8_epi32(_mm_loadu_si128(sixteen));
      }
      _mm512_storeu_si512(p.zero_panel + i, _mm512_add_epi32(zero, offset));
    }
    return;
  }
  __m512i rows[16];
  for (int64_t g = 0; g < p.groups; g += 16) {
    const int64_t count = p.groups - g < 16 ? p.groups - g : 16;
    if (p.groups == 1) {
      rows[0] = _mm512_maskz_loadu_epi32(first(p.lanes), p.scale);
    } else {
      for (int64_t n = 0; n < 16; ++n) {
        rows[n] = n < p.lanes ? _mm512_maskz_loadu_epi32(first(count), p.scale + n * p.groups + g)
                              : _mm512_setzero_si512();
      }
      transpose(rows);
    }
    for (int64_t i = 0; i < count; ++i) {
      _mm512_storeu_si512(p.scale_panel + (g + i) * kPanel, rows[i]);
    }
    if (p.bits == 0) continue;
    if (p.zero_point == nullptr) {
      for (auto& row : rows) row = _mm512_setzero_si512();
    } else if (p.groups == 1) {
      rows[0] = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(p.lanes), p.zero_point));
    } else {
      for (int64_t n = 0; n < 16; ++n) {
        rows[n] = n < p.lanes ? _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(
                                    first(count), p.zero_point + n * p.groups + g))
                              : _mm512_setzero_si512();
      }
      transpose(rows);
    }
    for (int64_t i = 0; i < count; ++i) {
      _mm512_storeu_si512(p.zero_panel + (g + i) * kPanel, _mm512_add_epi32(rows[i], offset));
    }
  }
}

bool split_rows_avx512vnni(const SplitRows& s) {
  const int64_t segments = ceil_div(s.K, s.segment);
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  const __m512i half = _mm512_set1_epi32(128);
  for (int64_t m = 0; m < s.rows; ++m) {
    int8_t* const digits = s.digits + m * 3 * s.digits_stride;
    float* const scale = s.scale + m * 3 * segments;
    for (int64_t i = 0, k = 0; k < s.K; ++i, k += s.segment) {
      const int64_t inputs = s.K - k < s.segment ? s.K - k : s.segment;
      const float* const x = s.x + m * s.x_stride + k;
      // As integers the magnitudes of floats order alike, with infinity and NaN on top.
      __m512i top = _mm512_setzero_si512();
      for (int64_t j = 0; j < inputs; j += 16) {
        const __m512i values = _mm512_maskz_loadu_epi32(first(inputs - j), x + j);
        top = _mm512_max_epi32(top, _mm512_and_si512(values, magnitude));
      }
      const __m512 largest = _mm512_castsi512_ps(_mm512_set1_epi32(_mm512_reduce_max_epi32(top)));
      const float amax = _mm512_cvtss_f32(largest);
      if (!(amax <= 1e30f && (amax >= 1e-30f || amax == 0))) return false;
      const float inverse = amax == 0 ? 0 : kTop / amax;
      __m512i sum[3] = {};  // of the inputs after 0, 1 and 2 digits are taken off
      for (int64_t j = 0; j < inputs; j += 16) {
        const __mmask16 mask = first(inputs - j);
        const __m512 values = _mm512_maskz_loadu_ps(mask, x + j);
        __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(values, _mm512_set1_ps(inverse)));
        int8_t* const target = digits + k + j;
        for (int d = 2;; --d) {
          sum[d] = _mm512_add_epi32(sum[d], code);
          _mm_mask_storeu_epi8(target + d * s.digits_stride, mask, _mm512_cvtepi32_epi8(code));
          if (d == 0) break;
          code = _mm512_srai_epi32(_mm512_add_epi32(code, half), 8);
        }
      }
      uint32_t total = 0;  // modulo 2^32, which the sums of digits fit
      for (int d = 0; d < 3; ++d) {
        const auto rest = static_cast<uint32_t>(_mm512_reduce_add_epi32(sum[d]));
        s.offset[(m * 3 + d) * segments + i] = -128 * static_cast<int32_t>(rest - 256 * total);
        total = rest;
      }
      const float unit = amax / kTop;
      scale[i] = 65536.0f * unit;
      scale[segments + i] = 256.0f * unit;
      scale[2 * segments + i] = unit;
    }
    for (int d = 0; d < 3; ++d) {
      for (int64_t k = s.K; k < s.digits_columns; ++k) digits[d * s.digits_stride + k] = 0;
    }
  }
  return true;
}

void weight_only_dequantize_avx512vnni(const WeightOnlyPanel& p) {
  const int64_t inputs = 32 / p.bits;
  const __m512i mask = _mm512_set1_epi32((1 << p.bits) - 1);
  for (int64_t k = p.k; k < p.k + p.count; k += inputs) {
    const int64_t g = k / p.group * kPanel;
    const __m512i block = _mm512_loadu_si512(p.weight + k / inputs * kBlockBytes);
    const __m512i zero = _mm512_loadu_si512(p.zero + g);
    const __m512 scale = _mm512_loadu_ps(p.scale + g);
    float* const dense = p.dense + (k - p.k) * kPanel;
    for (int64_t j = 0; j < inputs; ++j) {
      const int shift = static_cast<int>(8 * (j % 4) + 4 * (j / 4));
      const __m512i code = _mm512_and_si512(_mm512_srli_epi32(block, shift), mask);
      const __m512 value = _mm512_cvtepi32_ps(_mm512_sub_epi32(code, zero));
      _mm512_storeu_ps(dense + j * kPanel, _mm512_mul_ps(value, scale));
    }
  }
}

}  // namespace llmq
