// weight_only_linear without an instruction set of its own, for any segment: one input of 16
// outputs at a time, in the 128-bit vectors that every target of GCC and Clang has. Also serves, on
// every instruction set, segments that end inside a block.
//
//     y[n] = Σ_segments scale · x_scale · Σ_k∈segment (w[n, k] − zero) · x[k]
//
// Integer dot products run in float32, exact while below 2^24: 255 · 127 · 512 is. Tile: 1 panel ×
// 1 row. Bound by widening codes to floats. Reached on one EPYC Genoa core, whole op, 4096×4096,
// where torch's float32 takes 3.6 ms (M = 1) and 12 ms (M = 16): w8a16 2.3 and 19 ms, w4a16 in
// groups of 32 2.6 and 19 ms, w4a8 3.5 and 40 ms.
#include <cstring>

#include "kernels.h"

namespace llmq {
namespace {

// Left alone, compilers unroll loops over 16 outputs into scalars before they look for vectors.
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
constexpr int kVectors = 4;            // 16 outputs
constexpr int64_t kExactInputs = 512;  // products that float32 adds without rounding

template <class Vector, class T>
Vector load(const T* p) {
  Vector vector;
  std::memcpy(&vector, p, sizeof(vector));
  return vector;
}

void store(float* p, Floats vector) { std::memcpy(p, &vector, sizeof(vector)); }

constexpr int shift_of(int64_t j) { return static_cast<int>(8 * (j % 4) + 4 * (j / 4)); }

// GCC leaves bodies that are called twice out of line, and their sums in memory.
#define LLMQ_INLINE __attribute__((always_inline))

// Calls body(k, block, shift) for inputs begin … end; whole blocks with shifts known when compiled.
template <int kBits, class Body>
void for_inputs(const uint8_t* weight, int64_t begin, int64_t end, const Body& body) {
  constexpr int64_t kInputs = 32 / kBits;
  for (int64_t k = begin; k < end;) {
    const uint8_t* const block = weight + k / kInputs * kBlockBytes;
    if (k % kInputs == 0 && end - k >= kInputs) {
#pragma GCC unroll 8
      for (int64_t j = 0; j < kInputs; ++j) body(k + j, block, shift_of(j));
      k += kInputs;
    } else {
      body(k, block, shift_of(k % kInputs));
      ++k;
    }
  }
}

// w − zero of outputs 4v … 4v + 3.
template <int kBits>
Floats decode(const uint8_t* block, const int32_t* zero, int shift, int v) {
  const Ints code = (load<Ints>(block + v * 16) >> shift) & ((1 << kBits) - 1);
  return __builtin_convertvector(code - load<Ints>(zero + 4 * v), Floats);
}

template <int kBits, int kRows>
void int8_gemm(const WeightOnlyInt8Gemm& g, int64_t row) {
  float* const y = g.y + row * kPanel;
  for (int64_t i = 0; i < kRows * kPanel; ++i) y[i] = 0;
  for (int64_t begin = 0, s = 0; begin < g.K; begin += g.segment, ++s) {
    const int64_t end = g.K - begin < g.segment ? g.K : begin + g.segment;
    const int64_t group = s / g.segments_per_group * kPanel;
    const float* const x_scale = g.x_scale + s * g.rows + row;
    Ints dot[kRows][kVectors] = {};
    for (int64_t part = begin; part < end; part += kExactInputs) {
      const int64_t stop = end - part < kExactInputs ? end : part + kExactInputs;
      Floats sum[kRows][kVectors] = {};
      for_inputs<kBits>(g.weight, part, stop,
                        [&](int64_t k, const uint8_t* block, int shift) LLMQ_INLINE {
                          const int8_t* const x = g.x + (k / 4 * g.rows + row) * 4 + k % 4;
                          for (int v = 0; v < kVectors; ++v) {
                            const Floats value = decode<kBits>(block, g.zero + group, shift, v);
                            for (int r = 0; r < kRows; ++r)
                              sum[r][v] += value * static_cast<float>(x[r * 4]);
                          }
                        });
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v) dot[r][v] += __builtin_convertvector(sum[r][v], Ints);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        float* const target = y + r * kPanel + 4 * v;
        const Floats both = load<Floats>(g.scale + group + 4 * v) * x_scale[r];
        store(target, load<Floats>(target) + __builtin_convertvector(dot[r][v], Floats) * both);
      }
    }
  }
}

template <int kBits>
void int8_gemm_rows(const WeightOnlyInt8Gemm& g) {
  int64_t row = 0;
  for (; row + 2 <= g.rows; row += 2) int8_gemm<kBits, 2>(g, row);
  if (row < g.rows) int8_gemm<kBits, 1>(g, row);
}

template <int kBits>
void gemv(const WeightOnlyPanel& p) {
  Floats y[kVectors] = {};
  for (int64_t begin = 0, g = 0; begin < p.K; begin += p.group, g += kPanel) {
    Floats sum[kVectors] = {};
    const auto add = [&](int64_t k, const uint8_t* block, int shift) LLMQ_INLINE {
      for (int v = 0; v < kVectors; ++v) {
        sum[v] += decode<kBits>(block, p.zero + g, shift, v) * p.x[k];
      }
    };
    for_inputs<kBits>(p.weight, begin, begin + p.group, add);
    for (int v = 0; v < kVectors; ++v) y[v] += sum[v] * load<Floats>(p.scale + g + 4 * v);
  }
  for (int v = 0; v < kVectors; ++v) store(p.y + 4 * v, y[v]);
}

template <int kBits>
void dequantize(const WeightOnlyPanel& p) {
  for_inputs<kBits>(
      p.weight, p.k, p.k + p.count, [&](int64_t k, const uint8_t* block, int shift) LLMQ_INLINE {
        const int64_t g = k / p.group * kPanel;
        for (int v = 0; v < kVectors; ++v) {
          const Floats value = decode<kBits>(block, p.zero + g, shift, v);
          store(p.dense + (k - p.k) * kPanel + 4 * v, value * load<Floats>(p.scale + g + 4 * v));
        }
      });
}

template <int kRows>
void panel_gemm(const PanelGemm& g, int64_t row) {
  float* const y = g.y + row * kPanel;
  Floats sum[kRows][kVectors];
  std::memcpy(sum, y, sizeof(sum));
  for (int64_t k = 0; k < g.K; ++k) {
    const float* const x = g.x + k * g.rows + row;
    for (int v = 0; v < kVectors; ++v) {
      const auto weight = load<Floats>(g.dense + k * kPanel + 4 * v);
      for (int r = 0; r < kRows; ++r) sum[r][v] += weight * x[r];
    }
  }
  std::memcpy(y, sum, sizeof(sum));
}

}  // namespace

void weight_only_int8_gemm_portable(const WeightOnlyInt8Gemm& g) {
  g.bits == 8 ? int8_gemm_rows<8>(g) : int8_gemm_rows<4>(g);
}

void weight_only_gemv_portable(const WeightOnlyPanel& p) { p.bits == 8 ? gemv<8>(p) : gemv<4>(p); }

void weight_only_dequantize_portable(const WeightOnlyPanel& p) {
  p.bits == 8 ? dequantize<8>(p) : dequantize<4>(p);
}

void panel_gemm_portable(const PanelGemm& g) {
  int64_t row = 0;
  for (; row + 2 <= g.rows; row += 2) panel_gemm<2>(g, row);
  if (row < g.rows) panel_gemm<1>(g, row);
}

void panel_scales_portable(const PanelScales& p) {
  const int32_t stored_zero = p.bits == 8 ? 128 : p.zero_point == nullptr ? 8 : 0;
  if (p.scale == nullptr) {
    for (int64_t i = 0; i < p.groups * kPanel; ++i) {
      p.zero_panel[i] = stored_zero + (p.zero_point == nullptr ? 0 : p.zero_point[i]);
    }
    return;
  }
  for (int64_t n = 0; n < kPanel; ++n) {
    const bool present = n < p.lanes;
    for (int64_t g = 0; g < p.groups; ++g) {
      const int64_t i = n * p.groups + g;
      p.scale_panel[g * kPanel + n] = present ? p.scale[i] : 0;
      if (p.bits == 0) continue;
      const int32_t zero = present && p.zero_point != nullptr ? p.zero_point[i] : 0;
      p.zero_panel[g * kPanel + n] = stored_zero + zero;
    }
  }
}

}  // namespace llmq
