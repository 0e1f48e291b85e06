// weight_only_linear with int8 activations on AVX-VNNI: a vpdpbusd for 8 outputs × 4 inputs, or two
// for the nibbles of 8. Nothing saturates, so stored codes are operands as they are. Tile: a panel
// × 6 rows. Reached on one core of a Xeon held to it, 4096×4096, w4a8 in groups of 32: M = 1 400 us
// (AVX2 580), M = 256 43 ms (62).
#include "weight_only_int8.h"

#if !defined(__AVXVNNI__) || defined(__AVX512F__)
#error "setup.py gives this file its instruction set by its name: _avxvnni"
#endif

namespace llmq {
namespace {

// sums += 4 products u8 · s8 a lane. Not intrinsics: GCC 12 gives the registers to the inputs that
// both halves share, and keeps the sums in memory.
void dot4(__m256i& sums, __m256i weight, const int8_t* x) {
  __m256i input;
  asm("vpbroadcastd %[x], %[input]\n\t"
      "%{vex%} vpdpbusd %[input], %[weight], %[sums]"
      : [sums] "+x"(sums), [input] "=&x"(input)
      : [x] "m"(*reinterpret_cast<const int32_t*>(x)), [weight] "x"(weight));
}

struct Fours {
  // 12 chains of sums, as a vpdpbusd takes 5 cycles and two start in each.
  static constexpr int kHalves = 2, kRows = 6;
  static constexpr bool kSigned = false;
  template <int kBits, int R>
  [[gnu::always_inline]] static void add(__m256i (&dot)[R], const uint8_t* weight, const int8_t* x,
                                         int64_t stride) {
    const __m256i block = load(weight);
    if constexpr (kBits == 8) {
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) dot4(dot[r], block, x + r * 4);
    } else {
      const __m256i low_nibbles = _mm256_set1_epi8(15);
      const __m256i low = _mm256_and_si256(block, low_nibbles);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(block, 4), low_nibbles);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        dot4(dot[r], low, x + r * 4);
        dot4(dot[r], high, x + stride + r * 4);
      }
    }
  }
};

}  // namespace

void weight_only_int8_gemm_avxvnni(const WeightOnlyInt8Gemm& g) { int8_gemm<Fours>(g); }

}  // namespace llmq
