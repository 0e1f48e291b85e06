// Codes to A fragments of mma, in registers: no conversion instruction, one FMA a pair at most two.
//
// A code u placed in the mantissa of a float of the right exponent is 2^e + u; one FMA takes 2^e
// and the zero point away, exactly. `zero` is what it adds, twice, by zero_word.
//   f16   int8  0x64uu = 1024 + u with u = code + 128
//         int4  0x640u = 1024 + u; 0x64u0 = 1024 + 16u, times 1/16, whose zero is 960 more
//   bf16  int4  0x430u = 128 + u
//         int8  has a mantissa bit too few: 0x43ll = 128 + l with the lower 7 bits l, minus
//               0x43s0 = 128 + 128·sign, then the zero point
#pragma once

#include "kernels.h"
#include "ptx.cuh"

namespace llmq::cuda {

// T where zero points are what they are without any, so that int8 codes in bf16 need not add it.
template <class T>
struct WithoutZeroPoint : T {};

template <class T>
LLMQ_PTX uint32_t twice(float value) {
  T rounded;
  ptx::cvt(value, rounded);
  return rounded.bits * 0x10001u;
}

// The word that fragments of a row subtract; exact, since |zero_point| ≤ 128.
template <int kBits>
LLMQ_PTX uint32_t zero_word(int zero_point, Half) {
  return twice<Half>(static_cast<float>(-(kBits == 8 ? 1024 + 128 : 1024) - zero_point));
}
template <int kBits>
LLMQ_PTX uint32_t zero_word(int zero_point, BFloat16) {
  return twice<BFloat16>(static_cast<float>(-(kBits == 8 ? 0 : 128) - zero_point));
}

// Four int8 codes of one row to its two registers.
LLMQ_PTX void int8_pairs(uint32_t codes, uint32_t zero, uint32_t& low, uint32_t& high, Half type) {
  constexpr uint32_t kOne = 0x3c003c00;
  const uint32_t u = codes ^ 0x80808080u;
  low = ptx::fma2(ptx::prmt(u, 0x64646464u, 0x4140), kOne, zero, type);
  high = ptx::fma2(ptx::prmt(u, 0x64646464u, 0x4342), kOne, zero, type);
}
LLMQ_PTX uint32_t int8_pair(uint32_t spread, BFloat16 type) {
  constexpr uint32_t kOne = 0x3f803f80;
  const uint32_t value = ptx::lop3<ptx::kAndOr>(spread, 0x007f007fu, 0x43004300u);
  const uint32_t minus = ptx::lop3<ptx::kAndOr>(spread, 0x00800080u, 0xc300c300u);
  return ptx::fma2(value, kOne, minus, type);
}
LLMQ_PTX void int8_pairs(uint32_t codes, uint32_t, uint32_t& low, uint32_t& high,
                         WithoutZeroPoint<BFloat16> t) {
  low = int8_pair(ptx::prmt(codes, 0, 0x4140), t);
  high = int8_pair(ptx::prmt(codes, 0, 0x4342), t);
}
LLMQ_PTX void int8_pairs(uint32_t codes, uint32_t zero, uint32_t& low, uint32_t& high, BFloat16 t) {
  constexpr uint32_t kOne = 0x3f803f80;
  int8_pairs(codes, zero, low, high, WithoutZeroPoint<BFloat16>{});
  low = ptx::fma2(low, kOne, zero, t);
  high = ptx::fma2(high, kOne, zero, t);
}

// The lowest two nibbles of each half of a word: inputs (0, 4) and (1, 5) of its eight.
LLMQ_PTX void int4_pairs(uint32_t word, uint32_t zero, uint32_t& low, uint32_t& high, Half type) {
  constexpr uint32_t kOne = 0x3c003c00, kSixteenth = 0x2c002c00, k1024 = 0x64006400;
  constexpr uint32_t k960 = 0x63806380;
  low = ptx::fma2(ptx::lop3<ptx::kAndOr>(word, 0x000f000fu, k1024), kOne, zero, type);
  high = ptx::fma2(ptx::lop3<ptx::kAndOr>(word, 0x00f000f0u, k1024), kSixteenth,
                   ptx::fma2(zero, kOne, k960, type), type);
}
LLMQ_PTX void int4_pairs(uint32_t word, uint32_t zero, uint32_t& low, uint32_t& high,
                         BFloat16 type) {
  constexpr uint32_t kOne = 0x3f803f80, k128 = 0x43004300;
  low = ptx::fma2(ptx::lop3<ptx::kAndOr>(word, 0x000f000fu, k128), kOne, zero, type);
  high = ptx::fma2(ptx::lop3<ptx::kAndOr>(word >> 4, 0x000f000fu, k128), kOne, zero, type);
}

// Eight nibbles to int8 codes: inputs 0, 2, 4, 6, and 1, 3, 5, 7.
LLMQ_PTX void int4_codes(uint32_t word, uint32_t& even, uint32_t& odd) {
  even = word & 0x0f0f0f0fu;
  odd = word >> 4 & 0x0f0f0f0fu;
}

}  // namespace llmq::cuda
