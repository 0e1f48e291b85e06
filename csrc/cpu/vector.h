// One register of floats on the instruction set that a file is compiled for, so that a kernel bound
// by plain float arithmetic is written once. Internal linkage, as kernels.h asks.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>

namespace llmq {
namespace {

#if defined(__AVX512F__)

struct Vector {
  using Register = __m512;
  static constexpr int64_t kWidth = 16;
  static constexpr int kRegisters = 32;

  static Register load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Register a) { _mm512_storeu_ps(p, a); }
  static Register set(float a) { return _mm512_set1_ps(a); }
  static Register add(Register a, Register b) { return _mm512_add_ps(a, b); }
  static Register subtract(Register a, Register b) { return _mm512_sub_ps(a, b); }
  static Register multiply(Register a, Register b) { return _mm512_mul_ps(a, b); }
  static Register divide(Register a, Register b) { return _mm512_div_ps(a, b); }
  static Register fma(Register a, Register b, Register c) { return _mm512_fmadd_ps(a, b, c); }
  static Register max(Register a, Register b) { return _mm512_max_ps(a, b); }
  static Register min(Register a, Register b) { return _mm512_min_ps(a, b); }
  static float sum(Register a) { return _mm512_reduce_add_ps(a); }
  static float largest(Register a) { return _mm512_reduce_max_ps(a); }
  static Register round(Register a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
  // a · 2^n, n whole and -126 … 127
  static Register scale(Register a, Register n) { return _mm512_scalef_ps(a, n); }
  // a where test ≥ limit, else 0
  static Register keep(Register a, Register test, Register limit) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(test, limit, _CMP_GE_OQ), a);
  }
};

#elif defined(__AVX2__)

struct Vector {
  using Register = __m256;
  static constexpr int64_t kWidth = 8;
  static constexpr int kRegisters = 16;

  static Register load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Register a) { _mm256_storeu_ps(p, a); }
  static Register set(float a) { return _mm256_set1_ps(a); }
  static Register add(Register a, Register b) { return _mm256_add_ps(a, b); }
  static Register subtract(Register a, Register b) { return _mm256_sub_ps(a, b); }
  static Register multiply(Register a, Register b) { return _mm256_mul_ps(a, b); }
  static Register divide(Register a, Register b) { return _mm256_div_ps(a, b); }
  static Register fma(Register a, Register b, Register c) { return _mm256_fmadd_ps(a, b, c); }
  static Register max(Register a, Register b) { return _mm256_max_ps(a, b); }
  static Register min(Register a, Register b) { return _mm256_min_ps(a, b); }
  static float sum(Register a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static float largest(Register a) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }
  static Register round(Register a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Register scale(Register a, Register n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  static Register keep(Register a, Register test, Register limit) {
    return _mm256_and_ps(_mm256_cmp_ps(test, limit, _CMP_GE_OQ), a);
  }
};

#else

struct Vector {
  using Register = float;
  static constexpr int64_t kWidth = 1;
  static constexpr int kRegisters = 16;

  static Register load(const float* p) { return *p; }
  static void store(float* p, Register a) { *p = a; }
  static Register set(float a) { return a; }
  static Register add(Register a, Register b) { return a + b; }
  static Register subtract(Register a, Register b) { return a - b; }
  static Register multiply(Register a, Register b) { return a * b; }
  static Register divide(Register a, Register b) { return a / b; }
  static Register fma(Register a, Register b, Register c) { return a * b + c; }
  static Register max(Register a, Register b) { return a > b ? a : b; }
  static Register min(Register a, Register b) { return a < b ? a : b; }
  static float sum(Register a) { return a; }
  static float largest(Register a) { return a; }
  static Register round(Register a) { return (a + 0x1.8p23f) - 0x1.8p23f; }  // |a| < 2^22
  static Register scale(Register a, Register n) {
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    return a * __builtin_bit_cast(float, bits);
  }
  static Register keep(Register a, Register test, Register limit) {
    return test >= limit ? a : 0.0f;
  }
};

#endif

using Register = Vector::Register;
constexpr int64_t kWidth = Vector::kWidth;

// e^x within 2 ulp; 0 below -87.3, where it would no longer be a normal number, and e^88 above 88.
// 2^n · e^r with |r| ≤ ln(2) / 2 and the polynomial of Cephes' expf.
Register exponential(Register x) {
  using V = Vector;
  const Register lowest = V::set(-87.3f);
  const Register clamped = V::min(V::max(x, lowest), V::set(88.0f));
  const Register n = V::round(V::multiply(clamped, V::set(1.44269504f)));
  Register r = V::fma(n, V::set(-0.693359375f), clamped);
  r = V::fma(n, V::set(2.12194440e-4f), r);
  Register p = V::set(1.9875691500e-4f);
  p = V::fma(p, r, V::set(1.3981999507e-3f));
  p = V::fma(p, r, V::set(8.3334519073e-3f));
  p = V::fma(p, r, V::set(4.1665795894e-2f));
  p = V::fma(p, r, V::set(1.6666665459e-1f));
  p = V::fma(p, r, V::set(5.0000001201e-1f));
  p = V::fma(V::multiply(p, r), r, V::add(r, V::set(1.0f)));
  return V::keep(V::scale(p, n), x, lowest);
}

}  // namespace
}  // namespace llmq
