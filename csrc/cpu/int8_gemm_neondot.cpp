// int8_gemm with NEON dot products: y[m, n] = Σ_g x_scale[m, g] · (Σ_k∈g w[n, k] · x[m, k])
// · weight_scale[n] + bias[n], exact.
//
// A block of 64 bytes is four registers of 4 outputs × 4 inputs, as sdot takes them; flipping the
// top bit makes u = w + 128 signed, so x_offset is not needed. Tile: 1 panel × up to 6 tokens, 24
// accumulators. Bound by sdot for 6 tokens, by memory for 1: a block takes GCC 12 51 instructions
// for 6 tokens, of which 24 are sdot, and 16 for 1, of which 4. Arm speed is not yet measured.
#include "neon.h"

#if !defined(__ARM_FEATURE_DOTPROD)
#error "setup.py gives this file its instruction set by its name: _neondot"
#endif

namespace llmq {
namespace {

constexpr int64_t kTokens = 6;

template <int T>
void tile(const Int8Gemm& g, int64_t n, int64_t m) {
  const uint8_t* weight = g.weight + n * g.K4 * 4;
  const int64_t group_blocks = g.K4 / g.groups;
  const int8_t* x = g.x + m * g.x_stride;
  const uint8x16_t flip = vdupq_n_u8(0x80);
  float32x4_t sum[T][kRegisters] = {};
  for (int64_t group = 0; group < g.groups; ++group) {
    int32x4_t dot[T][kRegisters] = {};
    for (int64_t i = 0; i < group_blocks; ++i, weight += kBlockBytes, x += 4) {
      int8x16_t w[kRegisters];
      for (int v = 0; v < kRegisters; ++v)
        w[v] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(weight + 16 * v), flip));
      for (int t = 0; t < T; ++t) {
        const int8x16_t input = broadcast4(x + t * g.x_stride);
        for (int v = 0; v < kRegisters; ++v) dot[t][v] = vdotq_s32(dot[t][v], w[v], input);
      }
    }
    for (int t = 0; t < T; ++t) {
      const float scale = g.x_scale[(m + t) * g.groups + group];
      for (int v = 0; v < kRegisters; ++v)
        sum[t][v] = vfmaq_n_f32(sum[t][v], vcvtq_f32_s32(dot[t][v]), scale);
    }
  }
  store_tile(g, n, m, sum);
}

using Tile = void(const Int8Gemm&, int64_t n, int64_t m);
constexpr Tile* kTiles[] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};

}  // namespace

void int8_gemm_neondot(const Int8Gemm& g) {
  for (int64_t n = 0; n < g.N; n += kPanel) {
    for (int64_t m = 0; m < g.M; m += kTokens) {
      kTiles[g.M - m < kTokens ? g.M - m : kTokens](g, n, m);
    }
  }
}

}  // namespace llmq
