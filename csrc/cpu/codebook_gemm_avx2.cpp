// codebook_linear on AVX2 + FMA, for 8 outputs at a time, over panels8 and panels4 (kernels.h):
//
//     y[n] = Σ_groups scale[n, g] · Σ_k∈g codebook[code[n, k]] · x[k]
//
// 4 bits: the table is two registers; vpermps reads the low 3 bits of each word, so a code needs a
// shift but no mask, and its fourth bit picks between the two. 8 bits: vgatherdps from a 1 KiB
// table. Tile: 1 panel × 1 token, four chains of FMA a half; several rows share dequantized weights
// (panel_gemm). Bound by the look-ups for one token, by FMA for many.
//
// Reached on one core, whole op, 4096×4096 (benchmarks/results/*/peers_1_threads.json): an EPYC
// Genoa M = 1 1.5 ms (4 bits in groups of 32: 7 of 27 GB/s) and 7.9 ms (8 bits), M = 256 84 and 72
// of 118 GOPS; a Xeon M = 1 1.9 and 3.1 ms, M = 256 75 and 72 GOPS.
#include <immintrin.h>

#include "kernels.h"

namespace llmq {
namespace {

constexpr int64_t kHalf = 8;      // outputs a register; a block of a panel is two
constexpr int64_t kAhead = 1024;  // bytes between the block in use and the one to fetch

__m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

template <int kBits>
struct Table;

template <>
struct Table<4> {
  explicit Table(const float* codebook)
      : low(_mm256_loadu_ps(codebook)), high(_mm256_loadu_ps(codebook + kHalf)) {}
  __m256 operator()(__m256i block, int j) const {
    const int shift = 8 * (j % 4) + 4 * (j / 4);
    const __m256i code = _mm256_srli_epi32(block, shift);
    const __m256 fourth_bit = _mm256_castsi256_ps(_mm256_slli_epi32(block, 28 - shift));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code),
                            _mm256_permutevar8x32_ps(high, code), fourth_bit);
  }
  __m256 low, high;
};

template <>
struct Table<8> {
  explicit Table(const float* codebook) : codebook(codebook) {}
  __m256 operator()(__m256i block, int j) const {
    const __m256i code = _mm256_and_si256(_mm256_srli_epi32(block, 8 * j), _mm256_set1_epi32(255));
    return _mm256_i32gather_ps(codebook, code, 4);
  }
  const float* codebook;
};

template <int kBits>
void gemv(const CodebookPanel& p) {
  constexpr int kInputs = 32 / kBits;
  const Table<kBits> table(p.codebook);
  __m256 y[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  const uint8_t* weight = p.weight;
  for (int64_t k = 0, g = 0; k < p.K; k += p.group, g += kPanel) {
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
          sum[h][j % 4] = _mm256_fmadd_ps(table(block[h], j), input, sum[h][j % 4]);
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
void dequantize(const CodebookPanel& p) {
  constexpr int kInputs = 32 / kBits;
  const Table<kBits> table(p.codebook);
  float* dense = p.dense;
  for (int64_t k = p.k; k < p.k + p.count; k += kInputs, dense += kInputs * kPanel) {
    const uint8_t* const weight = p.weight + k / kInputs * kBlockBytes;
    for (int64_t half = 0; half < kPanel; half += kHalf) {
      const __m256i block = load(weight + half * 4);
      const __m256 scale = _mm256_loadu_ps(p.scale + k / p.group * kPanel + half);
      for (int j = 0; j < kInputs; ++j) {
        _mm256_storeu_ps(dense + j * kPanel + half, _mm256_mul_ps(table(block, j), scale));
      }
    }
  }
}

}  // namespace

void codebook_gemv_avx2(const CodebookPanel& p) { p.bits == 8 ? gemv<8>(p) : gemv<4>(p); }

void codebook_dequantize_avx2(const CodebookPanel& p) {
  p.bits == 8 ? dequantize<8>(p) : dequantize<4>(p);
}

}  // namespace llmq
