// codebook_linear in plain C++, for any group and a codebook an output, over panels8 and panels4
// (kernels.h):
//
//     y[n] = Σ_groups scale[n, g] · Σ_k∈g codebook[code[n, k]] · x[k]
//
// One input of 16 outputs at a time: a load of each entry, and 4 products and sums of 4 outputs.
// Bound by the loads of codes and entries. Reached on one EPYC Genoa core, whole op, 4096×4096,
// 8 bits and 4 bits in groups of 32: M = 1 5.4 and 8.8 ms, M = 16 23 and 26 ms, where torch's
// float32 takes 12.7.
#include <cstring>

#include "kernels.h"

namespace llmq {
namespace {

// Left alone, compilers unroll loops over 16 outputs into scalars before they look for vectors.
typedef float Floats __attribute__((vector_size(16)));
constexpr int kVectors = 4;  // 16 outputs

Floats load(const float* p) {
  Floats vector;
  std::memcpy(&vector, p, sizeof(vector));
  return vector;
}

// codebook[code] of outputs 4v … 4v + 3 at input k.
template <int kBits>
Floats decode(const CodebookPanel& p, int64_t k, int v) {
  constexpr int64_t kInputs = 32 / kBits;
  const int64_t j = k % kInputs;
  const uint8_t* const bytes = p.weight + k / kInputs * kBlockBytes + 16 * v + j % 4;
  const float* const table = p.codebook + 4 * v * p.codebook_stride;
  const auto at = [&](int64_t n) {
    const int code = kBits == 8 ? bytes[4 * n] : (bytes[4 * n] >> (j / 4 * 4)) & 15;
    return table[n * p.codebook_stride + code];
  };
  return Floats{at(0), at(1), at(2), at(3)};
}

template <int kBits>
void gemv(const CodebookPanel& p) {
  Floats y[kVectors] = {};
  for (int64_t begin = 0, g = 0; begin < p.K; begin += p.group, g += kPanel) {
    Floats sum[kVectors] = {};
    for (int64_t k = begin; k < begin + p.group; ++k) {
      for (int v = 0; v < kVectors; ++v) sum[v] += decode<kBits>(p, k, v) * p.x[k];
    }
    for (int v = 0; v < kVectors; ++v) y[v] += sum[v] * load(p.scale + g + 4 * v);
  }
  std::memcpy(p.y, y, sizeof(y));
}

template <int kBits>
void dequantize(const CodebookPanel& p) {
  for (int64_t k = p.k; k < p.k + p.count; ++k) {
    float* const dense = p.dense + (k - p.k) * kPanel;
    const float* const scale = p.scale + k / p.group * kPanel;
    for (int v = 0; v < kVectors; ++v) {
      const Floats value = decode<kBits>(p, k, v) * load(scale + 4 * v);
      std::memcpy(dense + 4 * v, &value, sizeof(value));
    }
  }
}

}  // namespace

void codebook_gemv_portable(const CodebookPanel& p) { p.bits == 8 ? gemv<8>(p) : gemv<4>(p); }

void codebook_dequantize_portable(const CodebookPanel& p) {
  p.bits == 8 ? dequantize<8>(p) : dequantize<4>(p);
}

}  // namespace llmq
