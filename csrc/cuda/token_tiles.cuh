// The inputs of small_gemm.cuh: from rows in memory through a stage to B fragments of mma.
//
//     stage    [tokens, kTokenBytes], the inputs of a chunk; a token's units of 16 bytes at
//              (unit ^ swizzle(token)), so that neither copies nor loads meet a bank twice
//     Floats   f16 or bf16 as they are; Codes   int8, and whether groups of them have scales
//
// `load` gives a lane the inputs that its A fragments have, in the order in which fragments.cuh
// leaves the weights.
#pragma once

#include "block_plan.cuh"
#include "ptx.cuh"

namespace llmq::cuda {

// Where a unit is, the sum of one that is known to the compiler and of the lane's: 128 bytes on it
// is the same address and an offset.
LLMQ_PTX int place(int unit, int of_lane, int swizzle) {
  return (unit / 8 * 8 + ((unit % 8 + of_lane) ^ swizzle)) * 16;
}

// In f16 or bf16, multiplied with weights of so many bits that were converted to it.
template <class T, int kBits>
struct Floats {
  using Sum = float;
  using Element = T;
  static constexpr bool kCodes = false, kFoldsTokens = false;
  static constexpr int kSize = 2, kSteps = 2;  // bytes an input; mma for each 32 inputs

  LLMQ_PTX static int swizzle(int token) { return kBits == 8 ? token % 4 * 2 : token % 2 * 4; }

  // B fragments of 32 inputs of a token. Four bits: in the order in which int4_pairs leaves them.
  LLMQ_PTX static void load(uint32_t (&b)[kSteps][2], const unsigned char* row, int block,
                            int token, int lane) {
    if constexpr (kBits == 8) {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const int at = place(block * 4 + step * 2, lane % 4 / 2, swizzle(token)) + lane % 2 * 8;
        const auto* from = reinterpret_cast<const Words2*>(row + at);
        const Words2 w = ptx::ld_shared(from);
        b[step][0] = w.word[0], b[step][1] = w.word[1];
      }
    } else {
      const int at = place(block * 4, lane % 4, swizzle(token));
      const Words4 w = ptx::ld_shared(reinterpret_cast<const Words4*>(row + at));
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        b[step][0] = ptx::prmt(w.word[step], w.word[step + 2], 0x5410);
        b[step][1] = ptx::prmt(w.word[step], w.word[step + 2], 0x7632);
      }
    }
  }
};

// As int8 codes; with kGroups each group of inputs has its own scale.
template <bool kGroups, int kBits = 8>
struct Codes {
  using Sum = int32_t;
  static constexpr bool kCodes = true, kFoldsTokens = kGroups;
  static constexpr int kSize = 1, kSteps = 1;

  LLMQ_PTX static int swizzle(int token) { return kBits == 8 ? token % 8 : token % 4 * 2; }

  // Four bits: in the order in which int4_codes leaves them.
  LLMQ_PTX static void load(uint32_t (&b)[kSteps][2], const unsigned char* row, int block,
                            int token, int lane) {
    if constexpr (kBits == 8) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = place(block * 2 + i, 0, swizzle(token)) + lane % 4 * 4;
        b[0][i] = ptx::ld_shared(reinterpret_cast<const uint32_t*>(row + at));
      }
    } else {
      const int at = place(block * 2, lane % 4 / 2, swizzle(token)) + lane % 2 * 8;
      const Words2 w = ptx::ld_shared(reinterpret_cast<const Words2*>(row + at));
      b[0][0] = ptx::prmt(w.word[0], w.word[1], 0x6420);
      b[0][1] = ptx::prmt(w.word[0], w.word[1], 0x7531);
    }
  }
};

// A thread's share of the tokens of each chunk, those past M and inputs past K as zeros.
template <class X, int kTokens, int kTokenBytes>
class Tokens {
  static constexpr int kRowUnits = kTokenBytes / 16;
  static constexpr int kStep = kThreads / kRowUnits;  // tokens; swizzles repeat in it
  static constexpr int kCopies = (kTokens + kStep - 1) / kStep;

  const unsigned char* from;
  int row_bytes, unit, to;
  int tokens;  // that there are from the thread's first

 public:
  LLMQ_PTX Tokens(const SmallGemm& g, int m0, int thread)
      : row_bytes(g.K * X::kSize), unit(thread % kRowUnits) {
    const int token = thread / kRowUnits;
    tokens = g.M - m0 - token;
    to = token * kTokenBytes + (unit ^ X::swizzle(token)) * 16;
    from = static_cast<const unsigned char*>(g.x) + static_cast<int64_t>(m0 + token) * row_bytes;
  }

  LLMQ_PTX void copy(unsigned char* stage, int chunk) const {
    const int at = chunk * kTokenBytes + unit * 16;
    const bool inside = at < row_bytes;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (kTokens < kStep && to >= kTokens * kTokenBytes) continue;
      ptx::cp_async_16(stage + to + i * kStep * kTokenBytes,
                       from + at + int64_t{i * kStep} * row_bytes,
                       inside && i * kStep < tokens ? 16 : 0);
    }
  }
};

}  // namespace llmq::cuda
