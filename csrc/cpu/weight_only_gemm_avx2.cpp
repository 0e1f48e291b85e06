// weight_only_linear on AVX2 + FMA, over panels8 and panels4 (kernels.h):
//
//     y[n] = Σ_groups scale[n, g] · Σ_k∈g (w[n, k] − zero[n, g]) · x[k]
//
// int8 activations: tile of 1 panel × 4 rows; u8 × s8 products in pairs (vpmaddubsw), then in fours
// (vpmaddwd). Nibbles are operands as they are. Bytes go in as |w| · sign(x, w), which cannot
// saturate: 128 · 127 · 2 < 2^15.
//
// Float activations of one token come as three int8 digits (split_rows): 14 instructions for 32
// bytes, 18 for 64 nibbles, where floats need a shift, mask, subtraction, conversion and FMA for 8.
// More tokens share dequantized weights (panel_gemm, 6 rows × 16 outputs in 12 accumulators).
//
// Bound by those instructions for one token, by FMA for many. Reached on one EPYC Genoa core, whole
// op, 4096×4096 (benchmarks/results/*/peers_1_threads.json), w4a8 and w4a16 in groups of 32, w8a16:
// M = 1 1.1, 1.3 and 1.8 ms, 10, 8 and 9.5 of 27 GB/s; M = 256 113, 80 and 85 GOPS of 118 for
// floats.
#include "weight_only_int8.h"

namespace llmq {
namespace {

__m256i broadcast4(const int8_t* x) {
  return _mm256_set1_epi32(*reinterpret_cast<const int32_t*>(x));
}

// Four products a lane, summed into int32: 8 outputs × 4 (bits 8) or 8 (bits 4) inputs.
struct Pairs {
  // So that dots and results of 4 rows fit the 16 registers.
  static constexpr int kHalves = 1, kRows = 4;
  static constexpr bool kSigned = true;
  template <int kBits, int R>
  [[gnu::always_inline]] static void add(__m256i (&dot)[R], const uint8_t* weight, const int8_t* x,
                                         int64_t stride) {
    const __m256i ones = _mm256_set1_epi16(1);
    const __m256i block = load(weight);
    if constexpr (kBits == 8) {
      const __m256i code = _mm256_xor_si256(block, _mm256_set1_epi8(-128));
      const __m256i magnitude = _mm256_abs_epi8(code);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const __m256i input = _mm256_sign_epi8(broadcast4(x + r * 4), code);
        const __m256i pairs = _mm256_maddubs_epi16(magnitude, input);
        dot[r] = _mm256_add_epi32(dot[r], _mm256_madd_epi16(pairs, ones));
      }
    } else {
      const __m256i low_nibbles = _mm256_set1_epi8(15);
      const __m256i low = _mm256_and_si256(block, low_nibbles);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(block, 4), low_nibbles);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const __m256i pairs =
            _mm256_add_epi16(_mm256_maddubs_epi16(low, broadcast4(x + r * 4)),
                             _mm256_maddubs_epi16(high, broadcast4(x + stride + r * 4)));
        dot[r] = _mm256_add_epi32(dot[r], _mm256_madd_epi16(pairs, ones));
      }
    }
  }
};

void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

// Input j of the 8 outputs of half a block.
template <int kBits>
__m256 decode(__m256i block, __m256i zero, int j) {
  const __m256i mask = _mm256_set1_epi32((1 << kBits) - 1);
  const __m256i code = _mm256_and_si256(_mm256_srli_epi32(block, 8 * (j % 4) + 4 * (j / 4)), mask);
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(code, zero));
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
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    sum[r][0] = _mm256_loadu_ps(y + r * kPanel);
    sum[r][1] = _mm256_loadu_ps(y + r * kPanel + kHalf);
  }
  for (int64_t k = 0; k < g.K; ++k, x += g.rows) {
    const __m256 low = _mm256_loadu_ps(g.dense + k * kPanel);
    const __m256 high = _mm256_loadu_ps(g.dense + k * kPanel + kHalf);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const __m256 input = _mm256_set1_ps(x[r]);
      sum[r][0] = _mm256_fmadd_ps(low, input, sum[r][0]);
      sum[r][1] = _mm256_fmadd_ps(high, input, sum[r][1]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    _mm256_storeu_ps(y + r * kPanel, sum[r][0]);
    _mm256_storeu_ps(y + r * kPanel + kHalf, sum[r][1]);
  }
}

// Digits are in base 255, −127 … 127: vpsignb cannot negate −128, nor vpmaddubsw add two 128 · 128.
constexpr int32_t kBase = 255;
// What max|x| becomes: 127 below the largest sum of three digits, so that rounding cannot pass it.
constexpr float kTop = 127 * (kBase * kBase + kBase + 1) - 127;

// The nearest whole number of bases; a quotient near ½ may go the wrong way.
__m256i divide_base(__m256i v) {
  return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_cvtepi32_ps(v), _mm256_set1_ps(1.0f / kBase)));
}

// Lanes below `count`, for masked loads.
__m256i first(int64_t count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count < 8 ? count : 8)), lanes);
}

// The sum and the largest of 8 int32.
int32_t sum_of(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

int32_t largest_of(__m256i v) {
  __m128i s = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

// The low bytes of 8 int32.
int64_t low_bytes(__m256i v) {
  const __m256i pick = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
  const __m256i quads = _mm256_shuffle_epi8(v, pick);
  return _mm_cvtsi128_si64(
      _mm_unpacklo_epi32(_mm256_castsi256_si128(quads), _mm256_extracti128_si256(quads, 1)));
}

// 8 registers of 8 words become 8 of the columns.
void transpose(__m256i (&rows)[8]) {
  __m256i t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    rows[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2x128_si256(rows[i], rows[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(rows[i], rows[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) rows[i] = t[i];
}

}  // namespace

void weight_only_int8_gemm_avx2(const WeightOnlyInt8Gemm& g) { int8_gemm<Pairs>(g); }

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

void panel_scales_avx2(const PanelScales& p) {
  const int64_t whole = p.lanes == kPanel ? p.groups / 8 * 8 : 0;
  const int32_t stored_zero = p.bits == 8 ? 128 : p.zero_point == nullptr ? 8 : 0;
  const __m256i offset = _mm256_set1_epi32(stored_zero);
  if (p.scale == nullptr) {
    for (int64_t i = 0; i < p.groups * kPanel; i += 8) {
      __m256i zero = _mm256_setzero_si256();
      if (p.zero_point != nullptr) {
        const auto* const eight = reinterpret_cast<const __m128i*>(p.zero_point + i);
        zero = _mm256_cvtepi8_epi32(_mm_loadl_epi64(eight));
      }
      store(p.zero_panel + i, _mm256_add_epi32(zero, offset));
    }
    return;
  }
  __m256i rows[8];
  for (int64_t g = 0; g < whole; g += 8) {
    for (int64_t half = 0; half < kPanel; half += kHalf) {
      const int64_t at = half * p.groups + g;
      for (int64_t n = 0; n < 8; ++n) rows[n] = load(p.scale + at + n * p.groups);
      transpose(rows);
      for (int64_t i = 0; i < 8; ++i) {
        store(p.scale_panel + (g + i) * kPanel + half, rows[i]);
      }
      if (p.bits == 0) continue;
      for (int64_t n = 0; n < 8; ++n) {
        rows[n] = p.zero_point == nullptr
                      ? _mm256_setzero_si256()
                      : _mm256_cvtepi8_epi32(_mm_loadl_epi64(
                            reinterpret_cast<const __m128i*>(p.zero_point + at + n * p.groups)));
      }
      if (p.zero_point != nullptr) transpose(rows);
      for (int64_t i = 0; i < 8; ++i) {
        store(p.zero_panel + (g + i) * kPanel + half, _mm256_add_epi32(rows[i], offset));
      }
    }
  }
  for (int64_t n = 0; n < kPanel; ++n) {
    for (int64_t g = whole; g < p.groups; ++g) {
      const int64_t i = n * p.groups + g;
      const bool present = n < p.lanes;
      p.scale_panel[g * kPanel + n] = present ? p.scale[i] : 0;
      if (p.bits == 0) continue;
      p.zero_panel[g * kPanel + n] =
          stored_zero + (present && p.zero_point != nullptr ? p.zero_point[i] : 0);
    }
  }
}

bool split_rows_avx2(const SplitRows& s) {
  const int64_t segments = ceil_div(s.K, s.segment);
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  const __m256i base = _mm256_set1_epi32(kBase), most = _mm256_set1_epi32(127);
  for (int64_t m = 0; m < s.rows; ++m) {
    int8_t* const digits = s.digits + m * 3 * s.digits_stride;
    float* const scale = s.scale + m * 3 * segments;
    for (int64_t i = 0, k = 0; k < s.K; ++i, k += s.segment) {
      const int64_t inputs = s.K - k < s.segment ? s.K - k : s.segment;
      const float* const x = s.x + m * s.x_stride + k;
      // As integers the magnitudes of floats order alike, with infinity and NaN on top.
      __m256i top = _mm256_setzero_si256();
      for (int64_t j = 0; j < inputs; j += 8) {
        const __m256 values = _mm256_maskload_ps(x + j, first(inputs - j));
        top = _mm256_max_epi32(top, _mm256_and_si256(_mm256_castps_si256(values), magnitude));
      }
      const float amax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(largest_of(top))));
      if (!(amax <= 1e30f && (amax >= 1e-30f || amax == 0))) return false;
      const __m256 inverse = _mm256_set1_ps(amax == 0 ? 0 : kTop / amax);
      __m256i sum[3] = {};
      for (int64_t j = 0; j < inputs; j += 8) {
        const int64_t count = inputs - j < 8 ? inputs - j : 8;
        const __m256 values = _mm256_maskload_ps(x + j, first(count));
        __m256i rest = _mm256_cvtps_epi32(_mm256_mul_ps(values, inverse));
        for (int d = 2; d >= 0; --d) {
          const __m256i higher = d == 0 ? _mm256_setzero_si256() : divide_base(rest);
          __m256i digit = _mm256_sub_epi32(rest, _mm256_mullo_epi32(higher, base));
          digit = _mm256_max_epi32(_mm256_min_epi32(digit, most),
                                   _mm256_sub_epi32(_mm256_setzero_si256(), most));
          sum[d] = _mm256_add_epi32(sum[d], digit);
          const int64_t bytes = low_bytes(digit);
          __builtin_memcpy(digits + d * s.digits_stride + k + j, &bytes, count);
          rest = higher;
        }
      }
      float unit = amax / kTop;
      for (int d = 2; d >= 0; --d, unit *= kBase) {
        scale[d * segments + i] = unit;
        s.offset[(m * 3 + d) * segments + i] = -128 * sum_of(sum[d]);
      }
    }
    for (int d = 0; d < 3; ++d) {
      for (int64_t k = s.K; k < s.digits_columns; ++k) digits[d * s.digits_stride + k] = 0;
    }
  }
  return true;
}

}  // namespace llmq
