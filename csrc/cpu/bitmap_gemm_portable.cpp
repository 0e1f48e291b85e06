// bitmap_gemm and bitmap_expand in plain C++, over the bitmap panels of kernels.h:
//
//     y[m, n] = Σ_g x_scale[m, g] · (Σ_k∈g u[n, k] · x[m, k] + x_offset[m, g])
//               · weight_scale[n] + bias[n],   u = 128, code 0, where no byte was kept
//
// A block is filled with 128; then each set bit of its mask takes the next kept byte to its place,
// one a step. Tile: 1 panel × up to 8 tokens, which share the expanded block. Bound by those steps
// for few tokens, by widening bytes for many. Reached on one EPYC Genoa core, whole op, 4096×4096
// at 50 %: M = 1 12.3 ms (int8_gemm_portable 2.7), M = 16 46 ms.
#include "kernels.h"

#if defined(__AVX__)
#error "portable kernels must run on any x86-64: build this file without -mavx… or -march=native"
#endif

namespace llmq {
namespace {

constexpr int64_t kTokens = 8;

// Writes the next block to `out`; moves `weight` behind its kept bytes.
void next_block(const uint8_t*& weight, const uint8_t* mask, uint8_t* out) {
  uint64_t bits = 0;
  for (int i = 0; i < 8; ++i) bits |= static_cast<uint64_t>(mask[i]) << (8 * i);
  __builtin_memset(out, 0x80, kBlockBytes);
  for (; bits != 0; bits &= bits - 1) out[__builtin_ctzll(bits)] = *weight++;
}

// Unsigned, so that what the offset later takes away may wrap.
void add_block(const uint8_t* w, const int8_t* x, uint32_t* dot) {
  for (int64_t lane = 0; lane < kPanel; ++lane) {
    int32_t sum = 0;
    for (int64_t j = 0; j < 4; ++j) sum += static_cast<int32_t>(w[4 * lane + j]) * x[j];
    dot[lane] += static_cast<uint32_t>(sum);
  }
}

// One panel for tokens m … m + tokens.
void tile(const Int8Gemm& g, const uint8_t* weight, const uint8_t* mask, int64_t n, int64_t m,
          int64_t tokens) {
  const int64_t group_blocks = g.K4 / g.groups, lanes = g.N - n < kPanel ? g.N - n : kPanel;
  float sum[kTokens][kPanel] = {};
  for (int64_t group = 0; group < g.groups; ++group) {
    uint32_t dot[kTokens][kPanel];
    for (int64_t t = 0; t < tokens; ++t) {
      for (uint32_t& d : dot[t]) d = static_cast<uint32_t>(g.x_offset[(m + t) * g.groups + group]);
    }
    for (int64_t i = group * group_blocks; i < (group + 1) * group_blocks; ++i) {
      uint8_t block[kBlockBytes];
      next_block(weight, mask + 8 * i, block);
      const int8_t* x = g.x + m * g.x_stride + 4 * i;
      for (int64_t t = 0; t < tokens; ++t) add_block(block, x + t * g.x_stride, dot[t]);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      const float scale = g.x_scale[(m + t) * g.groups + group];
      for (int64_t lane = 0; lane < kPanel; ++lane) {
        sum[t][lane] += static_cast<float>(static_cast<int32_t>(dot[t][lane])) * scale;
      }
    }
  }
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const float bias = g.bias == nullptr ? 0.0f : g.bias[n + lane];
      g.y[(m + t) * g.y_stride + n + lane] = sum[t][lane] * g.weight_scale[n + lane] + bias;
    }
  }
}

}  // namespace

void bitmap_gemm_portable(const BitmapGemm& b) {
  const Int8Gemm& g = b.dense;
  for (int64_t n = 0; n < g.N; n += kPanel) {
    const int64_t p = n / kPanel;
    for (int64_t m = 0; m < g.M; m += kTokens) {
      tile(g, g.weight + b.start[p], b.mask + p * g.K4 * 8, n, m,
           g.M - m < kTokens ? g.M - m : kTokens);
    }
  }
}

void bitmap_expand_portable(const BitmapExpand& e) {
  const uint8_t* weight = e.weight;
  for (int64_t i = 0; i < e.blocks; ++i) {
    next_block(weight, e.mask + 8 * i, e.panels + i * kBlockBytes);
  }
}

}  // namespace llmq
