// codebook_linear in plain C++, for any group and for a codebook an output: w =
// codebook[code]·scale.
#include <cstring>

#include "kernels.h"

namespace llmq {
namespace {

// codebook[code] of the 16 outputs at input k.
template <int kBits>
void decode(const CodebookPanel& p, int64_t k, float (&value)[kPanel]) {
  constexpr int64_t kInputs = 32 / kBits;
  const int64_t j = k % kInputs;
  const auto shift = static_cast<int>(8 * (j % 4) + 4 * (j / 4));
  uint32_t words[kPanel];
  std::memcpy(words, p.weight + k / kInputs * kBlockBytes, kBlockBytes);
  for (int64_t n = 0; n < kPanel; ++n) {
    value[n] = p.codebook[n * p.codebook_stride + ((words[n] >> shift) & ((1u << kBits) - 1))];
  }
}

template <int kBits>
void gemv(const CodebookPanel& p) {
  float y[kPanel] = {};
  for (int64_t begin = 0, g = 0; begin < p.K; begin += p.group, g += kPanel) {
    float sum[kPanel] = {};
    for (int64_t k = begin; k < begin + p.group; ++k) {
      float value[kPanel];
      decode<kBits>(p, k, value);
      for (int64_t n = 0; n < kPanel; ++n) sum[n] += value[n] * p.x[k];
    }
    for (int64_t n = 0; n < kPanel; ++n) y[n] += sum[n] * p.scale[g + n];
  }
  std::memcpy(p.y, y, sizeof(y));
}

template <int kBits>
void dequantize(const CodebookPanel& p) {
  for (int64_t k = p.k; k < p.k + p.count; ++k) {
    float value[kPanel];
    decode<kBits>(p, k, value);
    float* const dense = p.dense + (k - p.k) * kPanel;
    const float* const scale = p.scale + k / p.group * kPanel;
    for (int64_t n = 0; n < kPanel; ++n) dense[n] = value[n] * scale[n];
  }
}

}  // namespace

void codebook_gemv_portable(const CodebookPanel& p) { p.bits == 8 ? gemv<8>(p) : gemv<4>(p); }

void codebook_dequantize_portable(const CodebookPanel& p) {
  p.bits == 8 ? dequantize<8>(p) : dequantize<4>(p);
}

}  // namespace llmq
