// bitmap_gemm and bitmap_expand with NEON dot products, over the bitmap panels of kernels.h:
//
//     y[m, n] = Σ_g x_scale[m, g] · (Σ_k∈g w[n, k] · x[m, k]) · weight_scale[n] + bias[n]
//
// 8 bytes of a block at a time: a table of 256 masks says which kept byte belongs where, and tbl
// puts it there; a place without one gets 0, which is code 0 once the kept bytes are signed. One
// cnt and one multiplication give where the kept bytes of all eight begin. Tile: 1 panel × up to 4
// tokens. Bound by expanding, which tokens share: 82 instructions of GCC 12 a block, where 16
// loads, 8 flips and 8 tbl are the least; then 33 for 4 tokens, 16 of them sdot, and 12 for 1. Arm
// speed is not yet measured.
#include "neon.h"

#if !defined(__ARM_FEATURE_DOTPROD)
#error "setup.py gives this file its instruction set by its name: _neondot"
#endif

namespace llmq {
namespace {

constexpr int64_t kTokens = 4;

// Byte i of an entry: which of the kept bytes belongs at i, or 0x80 for none.
struct Table {
  uint64_t places[256];
};

constexpr Table make_table() {
  Table table{};
  for (int mask = 0; mask < 256; ++mask) {
    uint64_t next = 0;
    for (int i = 0; i < 8; ++i) {
      const bool kept = (mask >> i & 1) != 0;
      table.places[mask] |= (kept ? next : 0x80) << (8 * i);
      next += kept;
    }
  }
  return table;
}

alignas(64) constexpr Table kTable = make_table();

struct Block {
  int8x16_t codes[kRegisters];
};

// The next block's signed codes, 0 where absent; moves `weight` behind its kept bytes.
Block next_block(const uint8_t*& weight, const uint8_t* mask) {
  const uint8x8_t counts = vcnt_u8(vld1_u8(mask));
  const uint64_t ends = vget_lane_u64(vreinterpret_u64_u8(counts), 0) * 0x0101010101010101;
  const uint64_t begins = ends << 8;
  uint8x8_t half[8];
  for (int i = 0; i < 8; ++i) {
    const uint8x8_t kept = veor_u8(vld1_u8(weight + (begins >> (8 * i) & 255)), vdup_n_u8(0x80));
    half[i] = vtbl1_u8(kept, vcreate_u8(kTable.places[mask[i]]));
  }
  weight += ends >> 56;
  Block block;
  for (int v = 0; v < kRegisters; ++v)
    block.codes[v] = vreinterpretq_s8_u8(vcombine_u8(half[2 * v], half[2 * v + 1]));
  return block;
}

template <int T>
void tile(const Int8Gemm& g, const uint8_t* weight, const uint8_t* mask, int64_t n, int64_t m) {
  const int64_t group_blocks = g.K4 / g.groups;
  const int8_t* x = g.x + m * g.x_stride;
  float32x4_t sum[T][kRegisters] = {};
  for (int64_t group = 0; group < g.groups; ++group) {
    int32x4_t dot[T][kRegisters] = {};
    for (int64_t i = 0; i < group_blocks; ++i, mask += 8, x += 4) {
      const Block block = next_block(weight, mask);
      for (int t = 0; t < T; ++t) {
        const int8x16_t input = broadcast4(x + t * g.x_stride);
        for (int v = 0; v < kRegisters; ++v)
          dot[t][v] = vdotq_s32(dot[t][v], block.codes[v], input);
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

using Tile = void(const Int8Gemm&, const uint8_t* weight, const uint8_t* mask, int64_t n,
                  int64_t m);
constexpr Tile* kTiles[kTokens] = {tile<1>, tile<2>, tile<3>, tile<4>};

}  // namespace

void bitmap_gemm_neondot(const BitmapGemm& b) {
  const Int8Gemm& g = b.dense;
  for (int64_t n = 0; n < g.N; n += kPanel) {
    const int64_t p = n / kPanel;
    for (int64_t m = 0; m < g.M; m += kTokens) {
      const int64_t count = g.M - m < kTokens ? g.M - m : kTokens;
      kTiles[count - 1](g, g.weight + b.start[p], b.mask + p * g.K4 * 8, n, m);
    }
  }
}

void bitmap_expand_neondot(const BitmapExpand& e) {
  const uint8x16_t flip = vdupq_n_u8(0x80);
  const uint8_t* weight = e.weight;
  for (int64_t i = 0; i < e.blocks; ++i) {
    const Block block = next_block(weight, e.mask + 8 * i);
    for (int v = 0; v < kRegisters; ++v) {
      const uint8x16_t codes = vreinterpretq_u8_s8(block.codes[v]);
      vst1q_u8(e.panels + i * kBlockBytes + 16 * v, veorq_u8(codes, flip));
    }
  }
}

}  // namespace llmq
