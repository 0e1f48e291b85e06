// What a decoder layer does to float rows between its linear layers:
//
//     rms_norm   y = x / sqrt(mean(x²) + eps) · weight
//     silu_mul   y = gate / (1 + e^-gate) · up
//     rope       x = x · cos + rotate_half(x) · sin, rotate_half(a, b) = (-b, a)
//     add_rows   y = a + b
//
// Rows are row-major and lie in the first- or second-level cache, which bounds add_rows: 91 GB/s of
// the 94 that memcpy does (AVX-512, one EPYC Genoa core, 256 rows of 576). rms_norm, 54, waits for
// its one chain of sums; silu_mul, 38, for the exponential and the division. The files that include
// this say what each instruction set takes.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace llmq {
namespace {

using V = Vector;

// Calls vector(i) for whole registers of `count` floats and single(i) for what is left.
template <class Whole, class Single>
[[gnu::always_inline]] inline void over(int64_t count, const Whole& whole, const Single& single) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) whole(i);
  for (; i < count; ++i) single(i);
}

void rms_norm_rows(const RmsNorm& c) {
  for (int64_t m = 0; m < c.rows; ++m) {
    const float* const x = c.x + m * c.x_stride;
    float* const y = c.y + m * c.y_stride;
    Register sums = V::set(0.0f);
    float rest = 0.0f;
    over(
        c.K, [&](int64_t k) { sums = V::fma(V::load(x + k), V::load(x + k), sums); },
        [&](int64_t k) { rest += x[k] * x[k]; });
    const float mean = (V::sum(sums) + rest) / static_cast<float>(c.K);
    const float factor = 1.0f / __builtin_sqrtf(mean + c.eps);
    const Register factors = V::set(factor);
    over(
        c.K,
        [&](int64_t k) {
          V::store(y + k, V::multiply(V::multiply(V::load(x + k), factors), V::load(c.weight + k)));
        },
        [&](int64_t k) { y[k] = x[k] * factor * c.weight[k]; });
  }
}

Register silu(Register x) {
  const Register one = V::set(1.0f);
  return V::divide(x, V::add(one, exponential(V::subtract(V::set(0.0f), x))));
}

void silu_mul_rows(const SiluMul& c) {
  for (int64_t m = 0; m < c.rows; ++m) {
    const float* const gate = c.gate + m * c.stride;
    const float* const up = c.up + m * c.stride;
    float* const y = c.y + m * c.y_stride;
    over(
        c.columns,
        [&](int64_t k) { V::store(y + k, V::multiply(silu(V::load(gate + k)), V::load(up + k))); },
        [&](int64_t k) {
          float lanes[kWidth] = {gate[k]};
          V::store(lanes, silu(V::load(lanes)));
          y[k] = lanes[0] * up[k];
        });
  }
}

void rope_rows(const Rope& c) {
  const int64_t half = c.D / 2;
  for (int64_t h = 0; h < c.heads; ++h) {
    float* const a = c.x + h * c.D;
    float* const b = a + half;
    over(
        half,
        [&](int64_t d) {
          const Register x = V::load(a + d), y = V::load(b + d);
          const Register low = V::multiply(x, V::load(c.cos + d));
          const Register high = V::multiply(y, V::load(c.cos + half + d));
          V::store(a + d, V::subtract(low, V::multiply(y, V::load(c.sin + d))));
          V::store(b + d, V::add(high, V::multiply(x, V::load(c.sin + half + d))));
        },
        [&](int64_t d) {
          const float x = a[d], y = b[d];
          a[d] = x * c.cos[d] - y * c.sin[d];
          b[d] = y * c.cos[half + d] + x * c.sin[half + d];
        });
  }
}

void add_all(const AddRows& c) {
  over(
      c.count, [&](int64_t i) { V::store(c.y + i, V::add(V::load(c.a + i), V::load(c.b + i))); },
      [&](int64_t i) { c.y[i] = c.a[i] + c.b[i]; });
}

}  // namespace
}  // namespace llmq
