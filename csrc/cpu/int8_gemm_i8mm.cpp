// int8_gemm with the int8 matrix extension: y[m, n] = Σ_g x_scale[m, g] · (Σ_k∈g u[n, k] · x[m, k]
// + x_offset[m, g]) · weight_scale[n] + bias[n], with u = w + 128 as panels8 hold it.
//
// usmmla multiplies 2 outputs × 8 inputs by 8 inputs × 2 tokens, twice the products of sdot. The
// registers of two blocks, zipped, are such pairs of outputs:
//
//     block i      n0k0…3  n1k0…3  n2k0…3  n3k0…3        zip1: n0k0…7  n1k0…7
//     block i + 1  n0k4…7  n1k4…7  n2k4…7  n3k4…7        zip2: n2k0…7  n3k0…7
//
// Tile: 1 panel × 2, 4 or 6 tokens, up to 24 accumulators; a last odd token runs int8_gemm_neondot.
// Bound by usmmla, then by the zips that tokens share: two blocks take GCC 12 63 instructions for 6
// tokens, of which 24 are usmmla (sdot: 102). Arm speed is not yet measured.
#include "neon.h"

#if !defined(__ARM_FEATURE_MATMUL_INT8)
#error "setup.py gives this file its instruction set by its name: _i8mm"
#endif

namespace llmq {
namespace {

constexpr int64_t kTokenPairs = 3;

// 8 inputs of two tokens; with one block left, 4 of each and zeros.
template <bool kTwoBlocks>
int8x16_t inputs(const int8_t* x, int64_t stride) {
  if constexpr (kTwoBlocks) return vcombine_s8(vld1_s8(x), vld1_s8(x + stride));
  uint32_t first, second;
  __builtin_memcpy(&first, x, 4);
  __builtin_memcpy(&second, x + stride, 4);
  return vcombine_s8(vcreate_s8(first), vcreate_s8(second));
}

template <int P, bool kTwoBlocks>
[[gnu::always_inline]] inline void multiply(int32x4_t (&dot)[P][2 * kRegisters],
                                            const uint8_t* weight, const int8_t* x,
                                            int64_t stride) {
  int8x16_t input[P];
  for (int p = 0; p < P; ++p) input[p] = inputs<kTwoBlocks>(x + 2 * p * stride, stride);
  for (int v = 0; v < kRegisters; ++v) {
    const uint32x4_t low = vreinterpretq_u32_u8(vld1q_u8(weight + 16 * v));
    const uint32x4_t high =
        kTwoBlocks ? vreinterpretq_u32_u8(vld1q_u8(weight + kBlockBytes + 16 * v)) : vdupq_n_u32(0);
    const uint8x16_t pair[2] = {vreinterpretq_u8_u32(vzip1q_u32(low, high)),
                                vreinterpretq_u8_u32(vzip2q_u32(low, high))};
    for (int h = 0; h < 2; ++h) {
      for (int p = 0; p < P; ++p)
        dot[p][2 * v + h] = vusmmlaq_s32(dot[p][2 * v + h], pair[h], input[p]);
    }
  }
}

// One panel × 2·P tokens.
template <int P>
void tile(const Int8Gemm& g, int64_t n, int64_t m) {
  const uint8_t* weight = g.weight + n * g.K4 * 4;
  const int64_t group_blocks = g.K4 / g.groups;
  const int8_t* x = g.x + m * g.x_stride;
  float32x4_t sum[2 * P][kRegisters] = {};
  for (int64_t group = 0; group < g.groups; ++group) {
    int32x4_t dot[P][2 * kRegisters] = {};
    int64_t i = 0;
    for (; i + 2 <= group_blocks; i += 2, weight += 2 * kBlockBytes, x += 8) {
      multiply<P, true>(dot, weight, x, g.x_stride);
    }
    for (; i < group_blocks; ++i, weight += kBlockBytes, x += 4) {
      multiply<P, false>(dot, weight, x, g.x_stride);
    }
    for (int p = 0; p < P; ++p) {
      for (int second = 0; second < 2; ++second) {
        const int64_t at = (m + 2 * p + second) * g.groups + group;
        const int32x4_t offset = vdupq_n_s32(g.x_offset[at]);
        for (int v = 0; v < kRegisters; ++v) {
          const int32x4_t* d = dot[p] + 2 * v;
          const int32x4_t token = second ? vuzp2q_s32(d[0], d[1]) : vuzp1q_s32(d[0], d[1]);
          float32x4_t& total = sum[2 * p + second][v];
          total = vfmaq_n_f32(total, vcvtq_f32_s32(vaddq_s32(token, offset)), g.x_scale[at]);
        }
      }
    }
  }
  store_tile(g, n, m, sum);
}

using Tile = void(const Int8Gemm&, int64_t n, int64_t m);
constexpr Tile* kTiles[] = {nullptr, tile<1>, tile<2>, tile<3>};

}  // namespace

void int8_gemm_i8mm(const Int8Gemm& g) {
  const int64_t even = g.M / 2 * 2;
  for (int64_t n = 0; n < g.N; n += kPanel) {
    for (int64_t m = 0; m < even; m += 2 * kTokenPairs) {
      kTiles[(even - m) / 2 < kTokenPairs ? (even - m) / 2 : kTokenPairs](g, n, m);
    }
  }
  if (even == g.M) return;
  Int8Gemm last = g;
  last.x += even * g.x_stride;
  last.x_scale += even * g.groups;
  last.x_offset += even * g.groups;
  last.y += even * g.y_stride;
  last.M = 1;
  int8_gemm_neondot(last);
}

}  // namespace llmq
