// Bitmap tiles (kernels.h) as the weights of small_gemm.cuh.
//
// Lane 4·g + t decodes groups of 8 int8 weights (2 units of 4 inputs) or 4 weights of 16 bits: at
// most 8 bytes of values. A block is 4 groups a lane, of one pair of units or one unit; its group
// 2r + h is of row 16r + 8h + g. A run holds what the 4 lanes of g need of a chunk, in the order
//
//     block | group | lane t | weight
//
// Where a lane's values begin is thus the sum of the counts of all blocks before, all groups before
// and the lanes before, of 4 lanes only. Tensor cores take it: A holds the counts, B zeros and
// ones. cp.async takes the 8 runs from wherever they begin to places 33 units of 16 bytes apart, so
// that what a warp reads of all of them at once lies side by side: on average fewer than two lanes
// meet in a bank. And for PRMT, which puts a group's values to their places, the product of the
// group's bits, spread to nibbles, with 0x1110 holds in each nibble how many bits are set below.
#pragma once

#include "rows.cuh"

namespace llmq::cuda {

template <int kSize>  // bytes of a value: int8, or bf16 and f16
struct Bitmap {
  static constexpr int kBits = 8;
  static constexpr bool kGroups = false;
  static constexpr int kChunk = bitmap_chunk(kSize), kParts = 1, kPairs = kChunk / 32;
  static constexpr int kWords = 4 * kSize;  // of 32 inputs, a lane
  static constexpr int kMaskBytes = bitmap_mask_bytes(kSize);
  static constexpr int kRunUnits = 4 * kChunk * kSize / 16 + 1;  // at most, of 16 bytes
  static constexpr int kPitch = kRunUnits * 16;
  static constexpr int kStageBytes = kMaskBytes + 8 * kPitch + 16;

  const unsigned char* header;  // of the chunk to copy
  const int64_t* offset;
  const unsigned char* values;
  int chunk, chunks;
  int64_t begin;  // of its values, in bytes
  uint32_t run;   // of those that this lane copies
  uint32_t mask;
  int32_t sum[4], at[kSize][4];  // bits, from a stage's first value on
  uint32_t before;               // B of the prefix sums

  LLMQ_PTX Bitmap(const SmallGemm& g, int first, int begin_chunk, int lane)
      : values(static_cast<const unsigned char*>(g.weight)),
        chunk(begin_chunk),
        chunks((g.K + kChunk - 1) / kChunk) {
    // A warp without outputs does as the last one that has some.
    const int64_t at =
        static_cast<int64_t>(ptx::min(first, g.N - 1) / kWarpOutputs) * chunks + chunk;
    header = g.bitmask + at * kMaskBytes;
    offset = g.offsets + at;
    find(lane);
    // Column 2c + e is what lane c of four gets of group e, and of group e + 2 from A's rows g + 8.
    const int c = lane / 8, e = lane / 4 % 2;
    const uint32_t lanes_before = lane % 4 < c ? 1 : 0;
    before = (0x01010000u + (e == 0 ? lanes_before : 1 + lanes_before * 0x100)) * kBits * kSize;
  }

  // The run that four lanes copy: eight lanes write two runs half a row of banks from each other.
  LLMQ_PTX static int copied(int lane) { return lane / 8 + lane / 4 % 2 * 4; }

  LLMQ_PTX void find(int lane) {
    begin = ptx::ld_global(offset) * kSize;
    run = ptx::ld_global(reinterpret_cast<const uint32_t*>(header) + copied(lane));
  }

  // Copies the next chunk, and finds the one after: it will be known when it is wanted.
  LLMQ_PTX void copy(unsigned char* stage, int, int lane) {
#pragma unroll
    for (int i = 0; i < kMaskBytes; i += 512) {
      const int byte = i + lane * 16;
      ptx::cp_async_16_once_if(byte < kMaskBytes, stage + byte, header + byte);
    }
    const int t = lane % 4, units = static_cast<int>(run >> 16) - t;
    const unsigned char* const from = values + begin + ((run & 0xffff) * kSize / 16 + t) * 16;
    unsigned char* const to = stage + kMaskBytes + copied(lane) * kPitch + t * 16;
#pragma unroll
    for (int i = 0; i <= kRunUnits; i += 4) {
      ptx::cp_async_16_once_if(i < units, to + i * 16, from + i * 16);
    }
    if (++chunk < chunks) header += kMaskBytes, ++offset;
    find(lane);
  }

  LLMQ_PTX void load(uint32_t (&words)[kWords], const unsigned char* stage, int r, int pair,
                     int lane) {
    if (r == 0) {
      const auto* const words_of = reinterpret_cast<const uint32_t*>(stage + kBitmapHeader);
      mask = ptx::ld_shared(words_of + lane * kPairs + pair);
      if (pair == 0) {
        const auto* const begins = reinterpret_cast<const uint16_t*>(stage);
        const int odd = ptx::ld_shared(begins + lane / 4 * 2) * kSize % 16;
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] = (lane / 4 * kPitch + odd) * 8;
      }
#pragma unroll
      for (int block = 0; block < kSize; ++block) add_up(block);
    }
#pragma unroll
    for (int block = 0; block < kSize; ++block) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int q = 2 * r + h;
        const Window window(stage + kMaskBytes, at[block][q]);
        uint32_t* const to = words + block * 4 + h;
        expand(bits(block * 4 + q), window, to[0], to[2]);
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
  // The 8 bytes from any bit on that begins one.
  struct Window {
    uint32_t low, high;
    LLMQ_PTX Window(const unsigned char* values, int32_t at) {
      const auto* from = reinterpret_cast<const uint32_t*>(values) + (at >> 5);
      const uint32_t first = ptx::ld_shared(from), second = ptx::ld_shared(from + 1);
      const uint32_t third = ptx::ld_shared(from + 2), shift = static_cast<uint32_t>(at);
      low = ptx::shf_r(first, second, shift);
      high = ptx::shf_r(second, third, shift);
    }
  };

  // A group's bits, as many bits from each other as PRMT takes to select a value.
  LLMQ_PTX uint32_t bits(int group) const {
    return mask >> group & (kSize == 1 ? 0x11111111u : 0x01010101u);
  }

  // Where the values of a block's four groups begin, and those of the next block.
  LLMQ_PTX void add_up(int block) {
    uint32_t count[4];  // each a byte
#pragma unroll
    for (int q = 0; q < 4; ++q) count[q] = ptx::popc(bits(block * 4 + q));
    const uint32_t low = ptx::prmt(count[0], count[1], 0x1140);
    const uint32_t all = ptx::prmt(ptx::prmt(count[2], count[3], 0x1140), low, 0x5410);
#pragma unroll
    for (int i = 0; i < 4; ++i) at[block][i] = sum[i];
    ptx::mma(at[block], {low, all}, before, int8_t{});
    ptx::mma(sum, {all, all}, 0x01010101u * kBits * kSize, int8_t{});
  }

  // The weights of a group: values where bits are, else zeros.
  LLMQ_PTX static void expand(uint32_t bits, const Window& window, uint32_t& low, uint32_t& high) {
    if constexpr (kSize == 1) {
      // Nibble i of the first: the bits below it, or 4 more, a zero, without its own.
      low = ptx::prmt(window.low, 0, bits * 0x110c + 0x4444);
      high = ptx::prmt(window.low, window.high, bits * 0x11111110 >> 16) &
             ptx::prmt(0, 0xff, bits >> 14);
    } else {
      low = ptx::prmt(window.low, 0, bits * 0x21bc + 0x5454);
      high = ptx::prmt(window.low, window.high, (bits * 0x22222200 + 0x10101010) >> 16) &
             ptx::prmt(0, 0xff, bits * 0x44 >> 16);
    }
  }
};

}  // namespace llmq::cuda
