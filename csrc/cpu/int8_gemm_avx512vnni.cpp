// int8_gemm with AVX-512 VNNI.
#include <immintrin.h>

#include "kernels.h"

#if !defined(__AVX512VNNI__)
#error "setup.py gives this file its instruction set by its name: _avx512vnni"
#endif

namespace llmq {
namespace {

constexpr int64_t kTokens = 6;

__mmask16 tail(int64_t left) {
  return left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
}

__m512i broadcast4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

template <int P, int T>
void tile(const Int8Gemm& g, int64_t n, int64_t m) {
  const uint8_t* weight = g.weight + n * g.K4 * 4;
  const int64_t panel_bytes = g.K4 * kBlockBytes, group_blocks = g.K4 / g.groups;
  const int8_t* x = g.x + m * g.x_stride;
  __m512i dot[P][T];
  __m512 sum[P][T];
  for (int p = 0; p < P; ++p)
    for (int t = 0; t < T; ++t) sum[p][t] = _mm512_setzero_ps();
  for (int64_t group = 0; group < g.groups; ++group) {
    for (int t = 0; t < T; ++t) {
      const __m512i offset = _mm512_set1_epi32(g.x_offset[(m + t) * g.groups + group]);
      for (int p = 0; p < P; ++p) dot[p][t] = offset;
    }
    for (int64_t i = group * group_blocks; i < (group + 1) * group_blocks; ++i) {
      __m512i w[P];
      for (int p = 0; p < P; ++p)
        w[p] = _mm512_loadu_si512(weight + p * panel_bytes + i * kBlockBytes);
      for (int t = 0; t < T; ++t) {
        const __m512i a = broadcast4(x + t * g.x_stride + 4 * i);
        for (int p = 0; p < P; ++p) dot[p][t] = _mm512_dpbusd_epi32(dot[p][t], w[p], a);
      }
    }
    for (int t = 0; t < T; ++t) {
      const __m512 scale = _mm512_set1_ps(g.x_scale[(m + t) * g.groups + group]);
      for (int p = 0; p < P; ++p)
        sum[p][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[p][t]), scale, sum[p][t]);
    }
  }
  for (int p = 0; p < P; ++p) {
    const int64_t at = n + p * kPanel;
    const __mmask16 mask = tail(g.N - at);
    const __m512 scale = _mm512_maskz_loadu_ps(mask, g.weight_scale + at);
    const __m512 bias =
        g.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, g.bias + at);
    for (int t = 0; t < T; ++t)
      _mm512_mask_storeu_ps(g.y + (m + t) * g.y_stride + at, mask,
                            _mm512_fmadd_ps(sum[p][t], scale, bias));
  }
}

template <int P>
void tokens(const Int8Gemm& g, int64_t n, int64_t m, int64_t count) {
  switch (count) {
    case 1:
      return tile<P, 1>(g, n, m);
    case 2:
      return tile<P, 2>(g, n, m);
    case 3:
      return tile<P, 3>(g, n, m);
    case 4:
      return tile<P, 4>(g, n, m);
    case 5:
      return tile<P, 5>(g, n, m);
    default:
      return tile<P, 6>(g, n, m);
  }
}

}  // namespace

void int8_gemm_avx512vnni(const Int8Gemm& g) {
  for (int64_t n = 0; n < g.N;) {
    const int64_t left = ceil_div(g.N - n, kPanel);
    for (int64_t m = 0; m < g.M; m += kTokens) {
      const int64_t count = g.M - m < kTokens ? g.M - m : kTokens;
      (left >= 4 ? tokens<4> : tokens<1>)(g, n, m, count);
    }
    n += (left >= 4 ? 4 : 1) * kPanel;
  }
}

}  // namespace llmq
