// What the NEON files share. All of it has internal linkage: each file is compiled with flags of
// its own (see kernels.h).
#pragma once

#include <arm_neon.h>

#include "kernels.h"

namespace llmq {
namespace {

constexpr int kRegisters = 4;  // of 4 outputs: a panel

// Four inputs of one token, for each of 4 outputs.
inline int8x16_t broadcast4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

// Four floats, 0 beyond the `left` that there are.
inline float32x4_t load_lanes(const float* p, int64_t left) {
  if (left >= 4) return vld1q_f32(p);
  float lanes[4] = {};
  for (int64_t i = 0; i < left; ++i) lanes[i] = p[i];
  return vld1q_f32(lanes);
}

inline void store_lanes(float* p, float32x4_t value, int64_t left) {
  if (left >= 4) return vst1q_f32(p, value);
  float lanes[4];
  vst1q_f32(lanes, value);
  for (int64_t i = 0; i < left; ++i) p[i] = lanes[i];
}

// y = sum · weight_scale + bias, for the panel from output n on and T tokens from m on.
template <int T>
[[gnu::always_inline]] inline void store_tile(const Int8Gemm& g, int64_t n, int64_t m,
                                              const float32x4_t (&sum)[T][kRegisters]) {
  for (int v = 0; v < kRegisters && n < g.N; ++v, n += 4) {
    const float32x4_t scale = load_lanes(g.weight_scale + n, g.N - n);
    const float32x4_t bias = g.bias == nullptr ? vdupq_n_f32(0) : load_lanes(g.bias + n, g.N - n);
    for (int t = 0; t < T; ++t) {
      store_lanes(g.y + (m + t) * g.y_stride + n, vfmaq_f32(bias, sum[t][v], scale), g.N - n);
    }
  }
}

}  // namespace
}  // namespace llmq
