// codebook_linear with NEON: w = codebook[code] · scale, looked up for 4 outputs at a time.
//
// 4 bits: the 16 floats are four registers, and tbl takes their bytes 4·code … 4·code + 3: a shift,
// mask, multiply-add and tbl for 4 floats, and an fmla; bound by tbl over four registers, which
// takes two to four cycles. 8 bits: 1 KiB is beyond tbl (16 look-ups of 64 bytes a register), so
// those run the portable look-ups one by one. A quarter of a block takes GCC 12 61 instructions, 8
// of them tbl and 8 fmla. Arm speed is not yet measured.
#include "neon.h"

#if !defined(__ARM_FEATURE_DOTPROD)
#error "setup.py gives this file its instruction set by its name: _neondot"
#endif

namespace llmq {
namespace {

constexpr int kInputs = 8;  // of a block

struct Table {
  explicit Table(const float* codebook) {
    for (int i = 0; i < 4; ++i) bytes.val[i] = vreinterpretq_u8_f32(vld1q_f32(codebook + 4 * i));
  }
  // Input j of 4 outputs.
  float32x4_t operator()(uint32x4_t block, int j) const {
    const int32x4_t shift = vdupq_n_s32(-(8 * (j % 4) + 4 * (j / 4)));
    const uint32x4_t code = vandq_u32(vshlq_u32(block, shift), vdupq_n_u32(15));
    const uint32x4_t index = vmlaq_u32(vdupq_n_u32(0x03020100), code, vdupq_n_u32(0x04040404));
    return vreinterpretq_f32_u8(vqtbl4q_u8(bytes, vreinterpretq_u8_u32(index)));
  }
  uint8x16x4_t bytes;
};

uint32x4_t load(const uint8_t* p) { return vreinterpretq_u32_u8(vld1q_u8(p)); }

}  // namespace

void codebook_gemv_neondot(const CodebookPanel& p) {
  if (p.bits == 8) return codebook_gemv_portable(p);
  const Table table(p.codebook);
  const uint8_t* weight = p.weight;
  float32x4_t y[kRegisters] = {};
  for (int64_t k = 0, g = 0; k < p.K; k += p.group, g += kPanel) {
    const int64_t end = p.K - k < p.group ? p.K : k + p.group;
    float32x4_t sum[kRegisters] = {};
    for (int64_t i = k; i < end; i += kInputs, weight += kBlockBytes) {
      for (int v = 0; v < kRegisters; ++v) {
        const uint32x4_t block = load(weight + 16 * v);
        for (int j = 0; j < kInputs; ++j) sum[v] = vfmaq_n_f32(sum[v], table(block, j), p.x[i + j]);
      }
    }
    for (int v = 0; v < kRegisters; ++v) {
      y[v] = vfmaq_f32(y[v], sum[v], vld1q_f32(p.scale + g + 4 * v));
    }
  }
  for (int v = 0; v < kRegisters; ++v) vst1q_f32(p.y + 4 * v, y[v]);
}

void codebook_dequantize_neondot(const CodebookPanel& p) {
  if (p.bits == 8) return codebook_dequantize_portable(p);
  const Table table(p.codebook);
  float* dense = p.dense;
  for (int64_t k = p.k; k < p.k + p.count; k += kInputs, dense += kInputs * kPanel) {
    const uint8_t* const weight = p.weight + k / kInputs * kBlockBytes;
    for (int v = 0; v < kRegisters; ++v) {
      const uint32x4_t block = load(weight + 16 * v);
      const float32x4_t scale = vld1q_f32(p.scale + k / p.group * kPanel + 4 * v);
      for (int j = 0; j < kInputs; ++j)
        vst1q_f32(dense + j * kPanel + 4 * v, vmulq_f32(table(block, j), scale));
    }
  }
}

}  // namespace llmq
