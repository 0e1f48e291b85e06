#include "tiles.h"

namespace llmq {

Result::Result(const Tensor& out, const Rows& x, int64_t m, int64_t rows, int64_t N,
               const float* bias)
    : target(static_cast<char*>(out.mutable_data_ptr()) + m * N * x.element_size()),
      y(x.dtype == Dtype::f32 ? reinterpret_cast<float*>(target)
                              : scratch<float>(Slot::y, rows * N)),
      bias(bias),
      dtype(x.dtype),
      rows(rows),
      N(N) {}

void Result::store() const {
  if (dtype != Dtype::f32) store_rows(y, N, target, dtype, rows, N);
}

void Result::put(const float* tile, int64_t digits, int64_t token, int64_t tokens,
                 int64_t panel) const {
  const int64_t first = panel * kPanel, lanes = std::min(kPanel, N - first);
  float shift[kPanel] = {};
  if (bias != nullptr) std::copy(bias + first, bias + first + lanes, shift);
  for (int64_t t = 0; t < tokens; ++t) {
    float sum[kPanel];
    std::copy(tile + (t * digits + digits - 1) * kPanel, tile + (t + 1) * digits * kPanel, sum);
    for (int64_t d = digits - 2; d >= 0; --d) {  // from the least digit up
      for (int64_t n = 0; n < kPanel; ++n) sum[n] += tile[(t * digits + d) * kPanel + n];
    }
    for (int64_t n = 0; n < kPanel; ++n) sum[n] += shift[n];
    std::copy(sum, sum + lanes, y + (token + t) * N + first);
  }
}

const float* float_tiles(const Rows& x, int64_t m, const Tiles& tiles) {
  const int64_t K = x.K, stride = round_up(K, 8);
  const float* const rows = float_rows(x, m, tiles.rows);
  float* const target = scratch<float>(Slot::tile_x, tiles.rows * stride);
  parallel_rows(tiles.count, K * kTile, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = tiles.begin(t), size = tiles.size(t);
      float* const tile = target + row * stride;
      for (int64_t r = 0; r < size; ++r) {
        const float* const source = rows + (row + r) * K;
        for (int64_t k = 0; k < K; ++k) tile[k * size + r] = source[k];
      }
      std::fill(tile + K * size, tile + stride * size, 0.0f);
    }
  });
  return target;
}

}  // namespace llmq
