// Bitmap tiles (kernels.h) as the weights of small_gemm.cuh.
//
// Lane 4·g + t has a mask word a tile: byte j = 2·step + h is 8 weights of row g + 8h, 4 inputs from
// 32·step + 4t on and 4 from 16 further. A packed sum over the lanes before (one shuffle a step for
// all four bytes) says where its values begin; two table entries turn 8 bits of mask into PRMT
// selectors and the number of values to move on by. The values of a byte stand lane after lane, so
// that the lanes of a load read one window of at most 256 bytes: few meet in a bank.
#pragma once

#include "rows.cuh"

namespace llmq::cuda {

template <int kSize>  // bytes of a value: int8, or bf16 and f16
struct Bitmap {
  static constexpr int kBits = 8;
  static constexpr bool kGroups = false;
  static constexpr int kChunk = bitmap_chunk(kSize), kParts = 1, kPairs = kChunk / 32;
  static constexpr int kWords = 4 * kSize;         // of 32 inputs, a lane
  static constexpr int kTilesAlong = kChunk / 64;  // of one row of tiles
  static constexpr int kMaskBytes = bitmap_mask_bytes(kSize);
  static constexpr int kStageBytes = kMaskBytes + kWarpOutputs * kChunk * kSize + kBitmapPadding;
  static constexpr int kTableBytes = 64;

  const unsigned char* masks;
  const unsigned char* values;
  const int64_t* offsets;
  bool there;
  uint32_t mask[kTiles], before[kTiles];

  LLMQ_PTX Bitmap(const SmallGemm& g, int first, int)
      : values(static_cast<const unsigned char*>(g.weight)), there(first < g.N) {
    const int64_t chunks = (g.K + kChunk - 1) / kChunk, strip = there ? first / kWarpOutputs : 0;
    masks = g.bitmask + strip * chunks * kMaskBytes;
    offsets = g.offsets + strip * (chunks + 1);
  }

  // Entry of so many bits: the selector that puts values where bits are, and above it how far to
  // shift them out.
  LLMQ_PTX static void fill_table(unsigned char* table) {
    const int bits = static_cast<int>(threadIdx.x);
    if (bits >= kTableBytes / 4) return;
    uint32_t selector = 0, next = 0;
#pragma unroll
    for (int i = 0; i < 4 / kSize; ++i) {
      const uint32_t zero = kSize == 1 ? 4 : 0x44, value = kSize == 1 ? next : next * 0x22 + 0x10;
      selector |= (bits >> i & 1 ? value : zero) << (4 * kSize * i);
      next += bits >> i & 1;
    }
    ptx::st_shared(reinterpret_cast<uint32_t*>(table) + bits, selector | next * 8 * kSize << 16);
  }

  LLMQ_PTX void copy(unsigned char* stage, int chunk, int lane) const {
    for (int i = lane; i < kMaskBytes / 16; i += 32) {
      const unsigned char* from = masks + static_cast<int64_t>(chunk) * kMaskBytes + i * 16;
      ptx::cp_async_16_once(stage + i * 16, there ? from : masks, there ? 16 : 0);
    }
    const int64_t begin = ptx::ld_global(offsets + chunk) * kSize;
    const int count = static_cast<int>(ptx::ld_global(offsets + chunk + 1) * kSize - begin) / 16;
    for (int i = lane; i < count; i += 32) {
      ptx::cp_async_16_once(stage + kMaskBytes + i * 16, values + begin + i * 16, there ? 16 : 0);
    }
  }

  LLMQ_PTX void load(uint32_t (&words)[kWords], const unsigned char* stage,
                     const unsigned char* table, int r, int pair, int lane) {
    const int tile = r * kTilesAlong + pair / 2;
    if (pair % 2 == 0) {
      mask[r] = ptx::ld_shared(
          reinterpret_cast<const uint32_t*>(stage + kBitmapHeader + tile * 128 + lane * 4));
      uint32_t counts = mask[r] - (mask[r] >> 1 & 0x55555555u);  // of bits, a byte
      counts = (counts & 0x33333333u) + (counts >> 2 & 0x33333333u);
      counts = (counts + (counts >> 4)) & 0x0f0f0f0fu;
      uint32_t sum = counts;
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const uint32_t other = ptx::shfl_up(sum, distance);
        sum += lane >= distance ? other : 0;
      }
      before[r] = sum - counts;  // at most 31 · 8 a byte
    }
    // Where the values of each byte of the tile's masks begin.
    const Words2 bases = ptx::ld_shared(reinterpret_cast<const Words2*>(stage + tile * 8));
    const auto entry = [&](uint32_t bits) {
      return ptx::ld_shared(reinterpret_cast<const uint32_t*>(table) + bits);
    };
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int byte = pair % 2 * 2 + h;
      const uint32_t bits = mask[r] >> (8 * byte) & 0xff;
      uint32_t at = (bases.word[pair % 2] >> (16 * h) & 0xffff) + (before[r] >> (8 * byte) & 0xff);
      if constexpr (kSize == 1) {
        const Window window(stage + kMaskBytes, at);
        const uint32_t low = entry(bits & 15), high = entry(bits >> 4);
        words[h] = ptx::prmt(window.low, 0, low);
        words[2 + h] = ptx::prmt(ptx::shf_rc(window.low, window.high, low >> 16), 0, high);
      } else {
#pragma unroll
        for (int unit = 0; unit < 2; ++unit) {
          const Window window(stage + kMaskBytes, at * 2);
          const uint32_t low = entry(bits >> (4 * unit) & 3),
                         high = entry(bits >> (4 * unit + 2) & 3);
          words[unit * 4 + h] = ptx::prmt(window.low, 0, low);
          words[unit * 4 + 2 + h] =
              ptx::prmt(ptx::shf_rc(window.low, window.high, low >> 16), 0, high);
          at += (low >> 20) + (high >> 20);
        }
      }
    }
  }

  template <class T>
  LLMQ_PTX static void floats(const uint32_t (&words)[kWords], int part, int step,
                              const uint32_t (&zero)[2], uint32_t (&a)[4], T type) {
    if constexpr (kSize == 1) {
      Rows<8>::floats(words, part, step, zero, a, type);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = words[step * 4 + i];
    }
  }

 private:
  // The 8 bytes from any byte on.
  struct Window {
    uint32_t low, high;
    LLMQ_PTX Window(const unsigned char* values, uint32_t at) {
      const auto* from = reinterpret_cast<const uint32_t*>(values + (at & ~3u));
      const uint32_t first = ptx::ld_shared(from), second = ptx::ld_shared(from + 1);
      const uint32_t third = ptx::ld_shared(from + 2), shift = at % 4 * 8;
      low = ptx::shf_r(first, second, shift);
      high = ptx::shf_r(second, third, shift);
    }
  };
};

}  // namespace llmq::cuda
