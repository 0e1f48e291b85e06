// int8_gemm in plain C++: y[m, n] = Σ_g x_scale[m, g] · (Σ_k∈g u[n, k] · x[m, k] + x_offset[m, g])
// · weight_scale[n] + bias[n], with u = w + 128 as panels8 hold it.
//
// Tile: 1 panel (16 outputs) × 1 token; 64 bytes of weight a step, widened to 32 bits by the
// compiler (SSE2 or NEON). Bound by that widening, not by memory.
// Reached on one EPYC Genoa core (SSE2): 4096×4096: M = 1 5.5 GB/s, 1.4 times torch's float32 with
// AVX-512; from M = 16 on slower than it, which is why this is not chosen where AVX2 runs.
#include "kernels.h"

#if defined(__AVX__)
#error "portable kernels must run on any x86-64: build this file without -mavx… or -march=native"
#endif

namespace llmq {
namespace {

// Unsigned, so that what the offset later takes away may wrap.
void add_block(const uint8_t* w, const int8_t* x, uint32_t* dot) {
  for (int64_t lane = 0; lane < kPanel; ++lane) {
    int32_t sum = 0;
    for (int64_t j = 0; j < 4; ++j) sum += static_cast<int32_t>(w[4 * lane + j]) * x[j];
    dot[lane] += static_cast<uint32_t>(sum);
  }
}

}  // namespace

void int8_gemm_portable(const Int8Gemm& g) {
  const int64_t group_blocks = g.K4 / g.groups;
  for (int64_t n = 0; n < g.N; n += kPanel) {
    const uint8_t* panel = g.weight + n * g.K4 * 4;
    const int64_t lanes = g.N - n < kPanel ? g.N - n : kPanel;
    for (int64_t m = 0; m < g.M; ++m) {
      float sum[kPanel] = {};
      for (int64_t group = 0; group < g.groups; ++group) {
        uint32_t dot[kPanel];
        for (uint32_t& d : dot) d = static_cast<uint32_t>(g.x_offset[m * g.groups + group]);
        for (int64_t i = group * group_blocks; i < (group + 1) * group_blocks; ++i) {
          add_block(panel + i * kBlockBytes, g.x + m * g.x_stride + 4 * i, dot);
        }
        const float scale = g.x_scale[m * g.groups + group];
        for (int64_t lane = 0; lane < kPanel; ++lane) {
          sum[lane] += static_cast<float>(static_cast<int32_t>(dot[lane])) * scale;
        }
      }
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const float bias = g.bias == nullptr ? 0.0f : g.bias[n + lane];
        g.y[m * g.y_stride + n + lane] = sum[lane] * g.weight_scale[n + lane] + bias;
      }
    }
  }
}

}  // namespace llmq
