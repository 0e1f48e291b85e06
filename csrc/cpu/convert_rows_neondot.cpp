// Rows of bfloat16 and float16 to and from float32 with NEON: row-major, of any stride.
//
//     bfloat16 = (bits + 0x7fff + bit 16) >> 16, half to even; a NaN is made quiet, bits | 0x400000
//
// 8 elements a step. Bound by memory: they are one load, two conversions and two stores (bfloat16
// rounds in five instructions a register more). Arm speed is not yet measured.
#include <arm_neon.h>

#include "kernels.h"

#if !defined(__ARM_FEATURE_DOTPROD)
#error "setup.py gives this file its instruction set by its name: _neondot"
#endif

namespace llmq {
namespace {

uint16x4_t to_bfloat(float32x4_t value) {
  const uint32x4_t bits = vreinterpretq_u32_f32(value);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, odd), vdupq_n_u32(0x7fff));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(value, value), rounded, quiet), 16);
}

template <Dtype dtype>
float32x4_t widen(uint16x4_t value) {
  if constexpr (dtype == Dtype::f16) return vcvt_f32_f16(vreinterpret_f16_u16(value));
  return vreinterpretq_f32_u32(vshll_n_u16(value, 16));
}

template <Dtype dtype>
uint16x4_t narrow(float32x4_t value) {
  if constexpr (dtype == Dtype::f16) return vreinterpret_u16_f16(vcvt_f16_f32(value));
  return to_bfloat(value);
}

// Calls body on 4 elements at a time; a row's last ones pass through buffers.
template <class Target, class Source, class Body>
void convert_rows(const ConvertRows& c, const Body& body) {
  for (int64_t m = 0; m < c.rows; ++m) {
    const Source* source = static_cast<const Source*>(c.source) + m * c.source_stride;
    Target* target = static_cast<Target*>(c.target) + m * c.target_stride;
    int64_t k = 0;
    for (; k + 8 <= c.columns; k += 8) {
      body(source + k, target + k);
      body(source + k + 4, target + k + 4);
    }
    for (; k + 4 <= c.columns; k += 4) body(source + k, target + k);
    if (k == c.columns) continue;
    Source from[4] = {};
    Target to[4];
    for (int64_t i = k; i < c.columns; ++i) from[i - k] = source[i];
    body(from, to);
    for (int64_t i = k; i < c.columns; ++i) target[i] = to[i - k];
  }
}

template <Dtype dtype>
void widen_rows(const ConvertRows& c) {
  convert_rows<float, uint16_t>(c, [](const uint16_t* source, float* target) {
    vst1q_f32(target, widen<dtype>(vld1_u16(source)));
  });
}

template <Dtype dtype>
void narrow_rows(const ConvertRows& c) {
  convert_rows<uint16_t, float>(c, [](const float* source, uint16_t* target) {
    vst1_u16(target, narrow<dtype>(vld1q_f32(source)));
  });
}

void copy_rows(const ConvertRows& c) {
  convert_rows<float, float>(
      c, [](const float* source, float* target) { vst1q_f32(target, vld1q_f32(source)); });
}

}  // namespace

void to_float_neondot(const ConvertRows& c) {
  if (c.dtype == Dtype::f32) return copy_rows(c);
  if (c.dtype == Dtype::bf16) return widen_rows<Dtype::bf16>(c);
  widen_rows<Dtype::f16>(c);
}

void from_float_neondot(const ConvertRows& c) {
  if (c.dtype == Dtype::f32) return copy_rows(c);
  if (c.dtype == Dtype::bf16) return narrow_rows<Dtype::bf16>(c);
  narrow_rows<Dtype::f16>(c);
}

}  // namespace llmq
