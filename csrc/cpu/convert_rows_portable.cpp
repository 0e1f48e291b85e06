// Rows of bfloat16 and float16 to and from float32, in plain C++: row-major, of any stride.
//
//     bfloat16 = (bits + 0x7fff + bit 16) >> 16, half to even; a NaN is made quiet, bits | 0x400000
//
// One element a step, which the compiler makes vectors of for bfloat16. Bound by memory from
// bfloat16, else by the arithmetic of each element, most of it float16's exponents. Reached on one
// EPYC Genoa core, 4096×4096, read and written together, where memcpy does 22 GB/s: bfloat16 27 to
// float32 and 18 from it, float16 5 both ways.
#include <bit>
#include <cmath>

#include "kernels.h"

#if defined(__AVX__)
#error "portable kernels must run on any x86-64: build this file without -mavx… or -march=native"
#endif

namespace llmq {
namespace {

float from_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7fff;
  if (magnitude < 0x400) {  // zero or subnormal: a multiple of 2^-24
    return std::copysign(static_cast<float>(magnitude) * 0x1p-24f, std::bit_cast<float>(sign | 1));
  }
  const uint32_t exponent = magnitude >= 0x7c00 ? 0x70000000 : 0x38000000;  // 255 − 31, 127 − 15
  return std::bit_cast<float>(sign | ((magnitude << 13) + exponent));
}

uint16_t to_half(float value) {
  uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint16_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
  if (bits < 0x38800000) {                       // subnormal: 0.5 has an ulp of 2^-24
    return sign | (std::bit_cast<uint32_t>(std::bit_cast<float>(bits) + 0.5f) - 0x3f000000);
  }
  return sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
}

float from_bfloat(uint16_t value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value) << 16);
}

uint16_t to_bfloat(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 0x40;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

float same(float value) { return value; }

template <class Target, class Source, Target (*convert)(Source)>
void convert_rows(const ConvertRows& c) {
  for (int64_t m = 0; m < c.rows; ++m) {
    const Source* source = static_cast<const Source*>(c.source) + m * c.source_stride;
    Target* target = static_cast<Target*>(c.target) + m * c.target_stride;
    for (int64_t k = 0; k < c.columns; ++k) target[k] = convert(source[k]);
  }
}

}  // namespace

void to_float_portable(const ConvertRows& c) {
  if (c.dtype == Dtype::f32) return convert_rows<float, float, same>(c);
  if (c.dtype == Dtype::bf16) return convert_rows<float, uint16_t, from_bfloat>(c);
  convert_rows<float, uint16_t, from_half>(c);
}

void from_float_portable(const ConvertRows& c) {
  if (c.dtype == Dtype::f32) return convert_rows<float, float, same>(c);
  if (c.dtype == Dtype::bf16) return convert_rows<uint16_t, float, to_bfloat>(c);
  convert_rows<uint16_t, float, to_half>(c);
}

}  // namespace llmq
