// quantize_rows with NEON: two passes over a row or group, the second from the first-level cache;
// one where the scale is given.
//
// 16 inputs a step: a load, an and and a maximum for each register of 4 in the first pass; a load,
// a product and a conversion in the second, then three narrowings, and one sdot that sums the 16
// codes. Bound by those instructions, not by memory: of GCC 12 15 and 18 for 16 float32 inputs, 4
// and 9 of them to load and store or to loop. Arm speed is not yet measured.
#include <arm_neon.h>

#include "quantize_rows.h"

#if !defined(__ARM_FEATURE_DOTPROD)
#error "setup.py gives this file its instruction set by its name: _neondot"
#endif

namespace llmq {
namespace {

constexpr int64_t kStep = 16;

template <Dtype dtype>
struct Input {
  using Element = uint16_t;
  static float32x4_t load(const Element* x) {
    const uint16x4_t half = vld1_u16(x);
    if constexpr (dtype == Dtype::f16) return vcvt_f32_f16(vreinterpret_f16_u16(half));
    return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
  }
};

template <>
struct Input<Dtype::f32> {
  using Element = float;
  static float32x4_t load(const Element* x) { return vld1q_f32(x); }
};

// Calls body(inputs, k, count) for kStep inputs at a time; a group's last ones come in a buffer.
template <class Element, class Body>
void for_steps(const Element* x, int64_t count, const Body& body) {
  int64_t k = 0;
  for (; k + kStep <= count; k += kStep) body(x + k, k, kStep);
  if (k == count) return;
  Element last[kStep] = {};
  for (int64_t i = k; i < count; ++i) last[i - k] = x[i];
  body(last, k, count - k);
}

// As integers, magnitudes order like floats, with infinity and NaN on top.
template <Dtype dtype>
uint32_t largest_magnitude(const typename Input<dtype>::Element* x, int64_t count) {
  const uint32x4_t magnitude = vdupq_n_u32(0x7fffffff);
  uint32x4_t largest[2] = {vdupq_n_u32(0), vdupq_n_u32(0)};  // two chains hide the latency
  for_steps(x, count, [&](const auto* step, int64_t, int64_t) {
    for (int i = 0; i < 4; ++i) {
      const uint32x4_t bits = vreinterpretq_u32_f32(Input<dtype>::load(step + 4 * i));
      largest[i % 2] = vmaxq_u32(largest[i % 2], vandq_u32(bits, magnitude));
    }
  });
  return vmaxvq_u32(vmaxq_u32(largest[0], largest[1]));
}

// Returns the sum of the codes, which are within ±127.
template <Dtype dtype, bool given>
int32_t encode(const typename Input<dtype>::Element* x, int64_t count, float inverse, int8_t* codes,
               [[maybe_unused]] uint32_t* largest) {
  const float32x4_t limit = vdupq_n_f32(127);
  int32x4_t sum = vdupq_n_s32(0);
  uint32x4_t most = vdupq_n_u32(0);
  for_steps(x, count, [&](const auto* step, int64_t k, int64_t present) {
    int16x4_t code[4];
    for (int i = 0; i < 4; ++i) {
      const float32x4_t input = Input<dtype>::load(step + 4 * i);
      float32x4_t value = vmulq_n_f32(input, inverse);
      if constexpr (given) {
        most = vmaxq_u32(most, vreinterpretq_u32_f32(vabsq_f32(input)));
        value = vmaxq_f32(vminq_f32(value, limit), vnegq_f32(limit));
      }
      code[i] = vmovn_s32(vcvtnq_s32_f32(value));
    }
    const int8x16_t bytes = vcombine_s8(vmovn_s16(vcombine_s16(code[0], code[1])),
                                        vmovn_s16(vcombine_s16(code[2], code[3])));
    sum = vdotq_s32(sum, bytes, vdupq_n_s8(1));
    if (present == kStep) {
      vst1q_s8(codes + k, bytes);
    } else {
      int8_t last[kStep];
      vst1q_s8(last, bytes);
      for (int64_t i = 0; i < present; ++i) codes[k + i] = last[i];
    }
  });
  if constexpr (given) *largest = vmaxvq_u32(most);
  return vaddvq_s32(sum);
}

void clear(int8_t* codes, int64_t count) {
  for (int64_t k = 0; k < count; ++k) codes[k] = 0;
}

template <Dtype dtype>
void quantize(const QuantizeRows& q) {
  quantize_groups<typename Input<dtype>::Element, largest_magnitude<dtype>, encode<dtype, false>,
                  encode<dtype, true>, clear>(q);
}

}  // namespace

void quantize_rows_neondot(const QuantizeRows& q) {
  if (q.dtype == Dtype::f32) return quantize<Dtype::f32>(q);
  if (q.dtype == Dtype::bf16) return quantize<Dtype::bf16>(q);
  quantize<Dtype::f16>(q);
}

}  // namespace llmq
