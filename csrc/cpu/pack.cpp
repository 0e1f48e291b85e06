// Between canonical weights (row-major codes) and the panels of kernels.h; a change of layout is a
// change here and in the microkernels that read it, and nowhere else.
#include <cstring>

#include "driver.h"

namespace llmq {
namespace {

// A thread packs at least this many bytes: packing moves about 2 GB/s a core.
constexpr int64_t kPackGrain = 1 << 16;

constexpr uint8_t kFlip = 0x80;  // int8 code ↔ code + 128

template <class PackPanel>
void over_panels(int64_t N, int64_t panel_bytes, const PackPanel& body) {
  if (panel_bytes == 0) return;  // no inputs: tensors without elements may have no address
  for_panels(N, panel_bytes, kPackGrain, body);
}

uint8_t nibble(const uint8_t* row, int64_t k, int64_t K) {
  return k < K ? (row[k / 2] >> (4 * (k & 1))) & 15 : 0;
}

void unpack_panels8(const uint8_t* packed, int64_t N, int64_t K, uint8_t* codes) {
  const int64_t K4 = ceil_div(K, 4);
  over_panels(N, K4 * kBlockBytes, [&](int64_t p) {
    for (int64_t n = p * kPanel; n < N && n < (p + 1) * kPanel; ++n) {
      const uint8_t* lane = packed + p * K4 * kBlockBytes + (n % kPanel) * 4;
      for (int64_t k = 0; k < K; ++k) {
        codes[n * K + k] = lane[k / 4 * kBlockBytes + k % 4] ^ kFlip;
      }
    }
  });
}

void unpack_panels4(const uint8_t* packed, int64_t N, int64_t K, uint8_t* nibbles) {
  const int64_t K8 = ceil_div(K, 8), K2 = ceil_div(K, 2);
  over_panels(N, K8 * kBlockBytes, [&](int64_t p) {
    for (int64_t n = p * kPanel; n < N && n < (p + 1) * kPanel; ++n) {
      const uint8_t* lane = packed + p * K8 * kBlockBytes + (n % kPanel) * 4;
      const auto at = [&](int64_t k) -> uint8_t {
        return k < K ? (lane[k / 8 * kBlockBytes + k % 4] >> (k % 8 < 4 ? 0 : 4)) & 15 : 0;
      };
      for (int64_t i = 0; i < K2; ++i) nibbles[n * K2 + i] = at(2 * i) | at(2 * i + 1) << 4;
    }
  });
}

}  // namespace

void pack_panels8(const uint8_t* codes, int64_t N, int64_t K, uint8_t* packed) {
  const int64_t K4 = ceil_div(K, 4);
  over_panels(N, K4 * kBlockBytes, [&](int64_t p) {
    uint8_t* panel = packed + p * K4 * kBlockBytes;
    if ((p + 1) * kPanel > N || K % 4 != 0) std::memset(panel, kFlip, K4 * kBlockBytes);
    for (int64_t n = p * kPanel; n < N && n < (p + 1) * kPanel; ++n) {
      const uint8_t* row = codes + n * K;
      uint8_t* lane = panel + (n % kPanel) * 4;
      int64_t k = 0;
      for (; k + 4 <= K; k += 4) {
        uint32_t four;
        std::memcpy(&four, row + k, 4);
        four ^= 0x80808080u;
        std::memcpy(lane + k / 4 * kBlockBytes, &four, 4);
      }
      for (; k < K; ++k) lane[k / 4 * kBlockBytes + k % 4] = row[k] ^ kFlip;
    }
  });
}

void pack_panels4(const uint8_t* nibbles, int64_t N, int64_t K, uint8_t* packed) {
  const int64_t K8 = ceil_div(K, 8), K2 = ceil_div(K, 2);
  over_panels(N, K8 * kBlockBytes, [&](int64_t p) {
    uint8_t* panel = packed + p * K8 * kBlockBytes;
    if ((p + 1) * kPanel > N) std::memset(panel, 0, K8 * kBlockBytes);
    for (int64_t n = p * kPanel; n < N && n < (p + 1) * kPanel; ++n) {
      const uint8_t* row = nibbles + n * K2;
      uint8_t* lane = panel + (n % kPanel) * 4;
      for (int64_t i = 0; i < K8; ++i) {
        for (int64_t j = 0; j < 4; ++j) {
          const int64_t k = 8 * i + j;
          lane[i * kBlockBytes + j] = nibble(row, k, K) | nibble(row, k + 4, K) << 4;
        }
      }
    }
  });
}

Tensor pack_panels(const Tensor& weight, int64_t bits) {
  constexpr const char* op = "pack_panels";
  LLMQ_CHECK(bits == 8 || bits == 4, op, "bits must be 8 or 4, got ", bits);
  LLMQ_CHECK(weight.dim() == 2 && weight.scalar_type() == ScalarType::Char, op,
             "weight must be int8 with 2 dimensions, got ", weight.dim());
  // An odd K leaves the last high nibble 0 and fills as many blocks as the even K above it.
  const int64_t N = weight.size(0), K = weight.size(1) * (8 / bits);
  const int64_t sizes[] = {ceil_div(N, kPanel), ceil_div(K * bits, 32), kPanel, 4};
  const Tensor rows = as_contiguous(weight), packed = empty(sizes, 4, ScalarType::Char);
  const auto* source = static_cast<const uint8_t*>(rows.const_data_ptr());
  (bits == 8 ? pack_panels8 : pack_panels4)(source, N, K,
                                            static_cast<uint8_t*>(packed.mutable_data_ptr()));
  return packed;
}

Tensor unpack_panels(const Tensor& packed, int64_t bits, int64_t N, int64_t K) {
  constexpr const char* op = "unpack_panels";
  LLMQ_CHECK(packed.dim() == 4, op, "packed must have 4 dimensions, got ", packed.dim());
  LLMQ_CHECK(N >= 0 && K >= 0, op, "N and K must not be negative, got ", N, " and ", K);
  const Tensor blocks = as_contiguous(packed);
  const uint8_t* source = panels(op, blocks, bits, N, K);
  const int64_t sizes[] = {N, ceil_div(K * bits, 8)};
  const Tensor rows = empty(sizes, 2, ScalarType::Char);
  (bits == 8 ? unpack_panels8 : unpack_panels4)(source, N, K,
                                                static_cast<uint8_t*>(rows.mutable_data_ptr()));
  return rows;
}

}  // namespace llmq
