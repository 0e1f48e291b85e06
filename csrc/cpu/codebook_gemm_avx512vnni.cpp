// codebook_linear on AVX-512 with VBMI, over panels8 and panels4 (kernels.h):
//
//     y[n] = Σ_groups scale[n, g] · Σ_k∈g codebook[code[n, k]] · x[k]
//
// 4 bits: the table is one register; vpermps reads the low 4 bits of each word, so a code needs a
// shift and neither mask nor conversion: 3 instructions for 16 weights.
//
// 8 bits: one byte of all 64 entries of a block at once, from 256 bytes in 4 registers (2 vpermi2b
// and a blend). One token takes entries and inputs as three int8 digits each (split_rows): 3
// look-ups and 8 vpdpbusd for 64 weights, or 2 and 6 for entries of 16 bits, where making floats
// takes 22 instructions before any is used, 17 of them on the two shuffle ports: 4 look-ups, then
// two rounds of interleaving of codes first transposed 4 × 4 a quarter so that the floats come out
// by input.
//
// Tile: 1 panel × 1 token. Several rows share dequantized weights (panel_gemm, 12 rows × 16 outputs
// in 12 accumulators). Bound by memory and look-ups for one token, by FMA for many.
//
// Reached on one core, whole op, 4096×4096 (benchmarks/results/*/peers_1_threads.json), 4 bits in
// groups of 32 | 8 bits:
//
//                     M = 1                                      M = 256
//     EPYC Genoa      751 us | 1180 us, 14 of 24 GB/s each       97 | 93 of 117 GOPS
//     Xeon            928 us | 2237 us, 11 | 8 of 15 GB/s        105 | 100 of 212 GOPS
#include <immintrin.h>

#include "kernels.h"

namespace llmq {
namespace {

constexpr int64_t kAhead = 4096;  // bytes between the block in use and the one to fetch

template <int kBits>
struct Table;

template <>
struct Table<4> {
  explicit Table(const CodebookPanel& p) : values(_mm512_loadu_ps(p.codebook)) {}
  void operator()(__m512i block, __m512 (&out)[8]) const {
    for (int j = 0; j < 8; ++j) {
      const __m512i code = _mm512_srli_epi32(block, 8 * (j % 4) + 4 * (j / 4));
      out[j] = _mm512_permutexvar_ps(code, values);
    }
  }
  __m512 values;
};

template <>
struct Table<8> {
  explicit Table(const CodebookPanel& p) {
    for (int i = 0; i < 16; ++i) planes[i / 4][i % 4] = _mm512_loadu_si512(p.planes + 64 * i);
  }
  void operator()(__m512i block, __m512 (&out)[4]) const {
    const __m512i by_input =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m512i code = _mm512_shuffle_epi8(block, by_input);
    const __mmask64 upper = _mm512_movepi8_mask(code);
    __m512i byte[4];
    for (int i = 0; i < 4; ++i) {
      const __m512i low = _mm512_permutex2var_epi8(planes[i][0], code, planes[i][1]);
      const __m512i high = _mm512_permutex2var_epi8(planes[i][2], code, planes[i][3]);
      byte[i] = _mm512_mask_blend_epi8(upper, low, high);
    }
    const __m512i low01 = _mm512_unpacklo_epi8(byte[0], byte[1]);
    const __m512i low23 = _mm512_unpacklo_epi8(byte[2], byte[3]);
    const __m512i high01 = _mm512_unpackhi_epi8(byte[0], byte[1]);
    const __m512i high23 = _mm512_unpackhi_epi8(byte[2], byte[3]);
    out[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low01, low23));
    out[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low01, low23));
    out[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(high01, high23));
    out[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(high01, high23));
  }
  __m512i planes[4][4];
};

template <int kBits>
void gemv(const CodebookPanel& p) {
  constexpr int kInputs = 32 / kBits;
  const Table<kBits> table(p);
  __m512 y = _mm512_setzero_ps();
  const uint8_t* weight = p.weight;
  for (int64_t k = 0, g = 0; k < p.K; k += p.group, g += kPanel) {
    // Four chains hide the FMA's latency of 4 cycles.
    __m512 sum[4];
    for (auto& chain : sum) chain = _mm512_setzero_ps();
    for (int64_t i = k; i < k + p.group; i += kInputs, weight += kBlockBytes) {
      _mm_prefetch(reinterpret_cast<const char*>(weight + kAhead), _MM_HINT_T1);
      __m512 value[kInputs];
      table(_mm512_loadu_si512(weight), value);
      for (int j = 0; j < kInputs; ++j) {
        sum[j % 4] = _mm512_fmadd_ps(value[j], _mm512_set1_ps(p.x[i + j]), sum[j % 4]);
      }
    }
    const __m512 total =
        _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
    y = _mm512_fmadd_ps(total, _mm512_loadu_ps(p.scale + g), y);
  }
  _mm512_storeu_ps(p.y, y);
}

template <int kBits>
void dequantize(const CodebookPanel& p) {
  constexpr int kInputs = 32 / kBits;
  const Table<kBits> table(p);
  float* dense = p.dense;
  for (int64_t k = p.k; k < p.k + p.count; k += kInputs, dense += kInputs * kPanel) {
    const __m512 scale = _mm512_loadu_ps(p.scale + k / p.group * kPanel);
    __m512 value[kInputs];
    table(_mm512_loadu_si512(p.weight + k / kInputs * kBlockBytes), value);
    for (int j = 0; j < kInputs; ++j) {
      _mm512_storeu_ps(dense + j * kPanel, _mm512_mul_ps(value[j], scale));
    }
  }
}

// 256 bytes to look 64 codes up in; `upper` says which codes are over 127.
struct Bytes {
  explicit Bytes(const uint8_t* bytes)
      : t0(_mm512_loadu_si512(bytes)),
        t1(_mm512_loadu_si512(bytes + 64)),
        t2(_mm512_loadu_si512(bytes + 128)),
        t3(_mm512_loadu_si512(bytes + 192)) {}
  __m512i t0, t1, t2, t3;
};

__m512i look_up(const Bytes& table, __m512i code, __mmask64 upper) {
  const __m512i low = _mm512_permutex2var_epi8(table.t0, code, table.t1);
  const __m512i high = _mm512_permutex2var_epi8(table.t2, code, table.t3);
  return _mm512_mask_blend_epi8(upper, low, high);
}

__m512i broadcast4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

// Not the intrinsic: GCC 12 would copy the accumulators and keep them in memory too.
void dot4(__m512i& sum, __m512i digits, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(digits), "v"(x));
}

template <int kRows>
void panel_gemm(const PanelGemm& g) {
  const float* x = g.x;
  __m512 sum[kRows];
  for (int r = 0; r < kRows; ++r) sum[r] = _mm512_loadu_ps(g.y + r * kPanel);
  for (int64_t k = 0; k < g.K; ++k, x += kRows) {
    const __m512 weight = _mm512_loadu_ps(g.dense + k * kPanel);
    for (int r = 0; r < kRows; ++r) sum[r] = _mm512_fmadd_ps(weight, _mm512_set1_ps(x[r]), sum[r]);
  }
  for (int r = 0; r < kRows; ++r) _mm512_storeu_ps(g.y + r * kPanel, sum[r]);
}

template <bool kThird>
void int8_gemv(const CodebookInt8Gemv& g) {
  const Bytes table_a(g.digits), table_b(g.digits + 256), table_c(g.digits + 512);
  const uint8_t* weight = g.weight;
  const int8_t* x = g.x;
  __m512 y = _mm512_setzero_ps();
  for (int64_t k = 0, s = 0; k < g.K; k += g.segment, ++s) {
    // Products of a digit of the weight and one of the input, but for the least, cc.
    // The digits stand 2^23 above the entry: 128 in the first, taken off by −128 · Σ x.
    // One register each: GCC keeps an array of them in memory.
    const int32_t* const x_sum = g.x_sum + s * 3;
    __m512i aa = _mm512_set1_epi32(128 * x_sum[0]), ab = _mm512_set1_epi32(128 * x_sum[1]);
    __m512i ac = _mm512_set1_epi32(128 * x_sum[2]), ba = _mm512_setzero_si512();
    __m512i bb = ba, bc = ba, ca = ba, cb = ba;
    const int64_t end = g.K - k < g.segment ? g.K : k + g.segment;
    for (int64_t i = k; i < end; i += 4, weight += kBlockBytes, x += 12) {
      const __m512i code = _mm512_loadu_si512(weight);
      _mm_prefetch(reinterpret_cast<const char*>(weight + kAhead), _MM_HINT_T1);
      const __mmask64 upper = _mm512_movepi8_mask(code);
      const __m512i xa = broadcast4(x), xb = broadcast4(x + 4), xc = broadcast4(x + 8);
      const __m512i a = look_up(table_a, code, upper);
      dot4(aa, a, xa);
      dot4(ab, a, xb);
      dot4(ac, a, xc);
      const __m512i b = look_up(table_b, code, upper);
      dot4(ba, b, xa);
      dot4(bb, b, xb);
      dot4(bc, b, xc);
      if constexpr (kThird) {
        const __m512i c = look_up(table_c, code, upper);
        dot4(ca, c, xa);
        dot4(cb, c, xb);
      }
    }
    // Each order is 256 times the next.
    const __m512i orders[4] = {aa, _mm512_add_epi32(ab, ba),
                               _mm512_add_epi32(ac, _mm512_add_epi32(bb, ca)),
                               _mm512_add_epi32(bc, cb)};
    __m512 sum = _mm512_setzero_ps();
    for (const __m512i& order : orders) {
      sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256), _mm512_cvtepi32_ps(order));
    }
    const float unit = 256 * g.unit * g.x_scale[s * 3 + 2];
    const float* const scale = g.scale + s / g.segments_per_group * kPanel;
    y = _mm512_fmadd_ps(sum, _mm512_mul_ps(_mm512_loadu_ps(scale), _mm512_set1_ps(unit)), y);
  }
  _mm512_storeu_ps(g.y, y);
}

}  // namespace

void codebook_int8_gemv_avx512vnni(const CodebookInt8Gemv& g) {
  g.third ? int8_gemv<true>(g) : int8_gemv<false>(g);
}

void codebook_gemv_avx512vnni(const CodebookPanel& p) { p.bits == 8 ? gemv<8>(p) : gemv<4>(p); }

void codebook_dequantize_avx512vnni(const CodebookPanel& p) {
  p.bits == 8 ? dequantize<8>(p) : dequantize<4>(p);
}

void panel_gemm_avx512vnni(const PanelGemm& g) {
  using Fn = void(const PanelGemm&);
  static constexpr Fn* kRows[kTile] = {
      panel_gemm<1>, panel_gemm<2>, panel_gemm<3>, panel_gemm<4>,  panel_gemm<5>,  panel_gemm<6>,
      panel_gemm<7>, panel_gemm<8>, panel_gemm<9>, panel_gemm<10>, panel_gemm<11>, panel_gemm<12>};
  kRows[g.rows - 1](g);
}

}  // namespace llmq
