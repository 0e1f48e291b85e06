// quantize_rows in plain C++: x [rows, K] row-major to codes, and a scale a row or group.
//
//     scale = max|x| / 127,   code = round_half_even(x · (127 / max|x|)),   edge cases: kernels.h
//
// The same codes, scales and sums as every other instruction set. Two passes over a row or group,
// 256 inputs at a time as float32; one where the scale is given. Bound by arithmetic. Reached on
// one EPYC Genoa core, 256 rows of 4096 floats: 499 us, 627 in groups of 64, 654 with a given
// scale.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "kernels.h"

#if defined(__AVX__)
#error "portable kernels must run on any x86-64: build this file without -mavx… or -march=native"
#endif

namespace llmq {
namespace {

// The bits of |x| order finite values, infinity, NaN.
constexpr uint32_t kInfinity = 0x7f800000;
constexpr int64_t kChunk = 256;  // inputs converted to float32 at a time

// As integers, magnitudes order like floats, with infinity and NaN on top.
uint32_t largest_magnitude(const float* x, int64_t count, uint32_t largest) {
  for (int64_t k = 0; k < count; ++k) {
    const uint32_t magnitude = std::bit_cast<uint32_t>(x[k]) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// |x · inverse| ≤ 127 (1 + 2 ulp), so adding and taking away 1.5·2²³ rounds half to even.
int32_t encode(const float* x, int64_t count, float inverse, int8_t* codes) {
  int32_t sum = 0;
  for (int64_t k = 0; k < count; ++k) {
    const int32_t code =
        std::bit_cast<int32_t>(x[k] * inverse + 0x1.8p23f) - std::bit_cast<int32_t>(0x1.8p23f);
    codes[k] = static_cast<int8_t>(code);
    sum += code;
  }
  return sum;
}

// The same of inputs that may be beyond what codes hold; std::min and std::max keep no NaN either.
int32_t encode_given(const float* x, int64_t count, float inverse, int8_t* codes) {
  float value[kChunk];
  for (int64_t k = 0; k < count; ++k) {
    value[k] = std::max(-127.0f, std::min(127.0f, x[k] * inverse));
  }
  return encode(value, count, 1, codes);
}

const float* floats(const QuantizeRows& q, int64_t at, int64_t count, float* buffer) {
  if (q.dtype == Dtype::f32) return static_cast<const float*>(q.x) + at;
  to_float_portable(
      {static_cast<const uint16_t*>(q.x) + at, count, buffer, count, 1, count, q.dtype});
  return buffer;
}

}  // namespace

void quantize_rows_portable(const QuantizeRows& q) {
  const int64_t groups = q.K == 0 ? 1 : q.K / q.group_size;
  float buffer[kChunk];
  for (int64_t m = 0; m < q.rows; ++m) {
    int8_t* codes = q.codes + m * q.codes_stride;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * q.group_size, end = begin + q.group_size;
      const auto each_chunk = [&](auto&& body) {
        for (int64_t k = begin; k < end; k += kChunk) {
          const int64_t count = end - k < kChunk ? end - k : kChunk;
          body(floats(q, m * q.x_stride + k, count, buffer), k, count);
        }
      };
      if (q.given != nullptr) {
        const float given = *q.given;
        uint32_t largest = kInfinity;
        int32_t sum = 0;
        if (given > 1e-30f && std::bit_cast<uint32_t>(given) < kInfinity) {
          largest = 0;
          each_chunk([&](const float* x, int64_t k, int64_t count) {
            largest = largest_magnitude(x, count, largest);
            sum += encode_given(x, count, 1.0f / given, codes + k);
          });
        }
        const bool valid = largest < kInfinity;
        for (int64_t k = begin; k < end && !valid; ++k) codes[k] = 0;
        q.scale[m * groups + g] = valid ? given : std::numeric_limits<float>::quiet_NaN();
        if (q.offset != nullptr) q.offset[m * groups + g] = valid ? -128 * sum : 0;
        continue;
      }
      uint32_t largest = 0;
      each_chunk([&](const float* x, int64_t, int64_t count) {
        largest = largest_magnitude(x, count, largest);
      });
      const float amax = std::bit_cast<float>(largest);
      const bool finite = largest < kInfinity;
      const float inverse = finite && amax > 1e-30f ? 127.0f / amax : 0.0f;
      int32_t sum = 0;
      if (inverse == 0.0f) {
        for (int64_t k = begin; k < end; ++k) codes[k] = 0;
      } else {
        each_chunk([&](const float* x, int64_t k, int64_t count) {
          sum += encode(x, count, inverse, codes + k);
        });
      }
      q.scale[m * groups + g] = finite ? amax / 127.0f : std::numeric_limits<float>::quiet_NaN();
      if (q.offset != nullptr) q.offset[m * groups + g] = -128 * sum;
    }
    for (int64_t k = q.K; k < q.codes_columns; ++k) codes[k] = 0;
  }
}

}  // namespace llmq
