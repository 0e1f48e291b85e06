#include "tiles.h"

#include <cstring>
#include <numeric>

#include "dispatch.h"

namespace llmq {

GroupedWeight::GroupedWeight(const char* op, const Tensor& weight, const Tensor& weight_scale,
                             int64_t bits, int64_t K)
    : bits(bits), K(K) {
  const bool panels = weight_scale.dim() == 3 && weight_scale.size(2) == kPanel;
  LLMQ_CHECK(weight_scale.scalar_type() == ScalarType::Float && (panels || weight_scale.dim() == 2),
             op, "weight_scale must be float32 [N, groups] or panels [N / 16, groups, 16], got ",
             shown(weight_scale));
  scale = float_data(op, "weight_scale", weight_scale);
  N = weight_scale.size(0) * (panels ? kPanel : 1);
  groups = weight_scale.size(1);
  codes = llmq::panels(op, weight, bits, N, K);
  LLMQ_CHECK(groups > 0 && K % groups == 0, op, "weight_scale has ", groups,
             " groups, which do not divide K=", K);
  in_panels = panels || (groups == 1 && N % kPanel == 0);
}

Result::Result(void* out, const Rows& x, int64_t m, int64_t rows, int64_t N, const float* bias)
    : target(static_cast<char*>(out) + m * N * x.element_size()),
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

CodeTiles code_tiles(const Codes& c, const Tiles& tiles, int64_t K, int64_t segment) {
  const int64_t width = round_up(K, 8), segments = ceil_div(K, segment);
  const int64_t rows = c.tokens * c.digits;
  const CodeTiles out{scratch<int8_t>(Slot::tile_x, rows * width),
                      scratch<float>(Slot::tile_scale, rows * segments),
                      scratch<int32_t>(Slot::tile_sum, rows * segments), width, segments};
  // −Σ codes of one row's segment, from the quantizer where it has summed just these.
  const auto sum_of = [&](int64_t row, int64_t s) {
    if (c.groups == segments) return c.offset[row * segments + s] / 128;
    const int8_t* const codes = c.codes + row * c.stride;
    int32_t sum = 0;
    for (int64_t k = s * segment; k < std::min(K, (s + 1) * segment); ++k) sum -= codes[k];
    return sum;
  };
  parallel_rows(tiles.count, K * kTile, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = tiles.begin(t) * c.digits, size = tiles.size(t) * c.digits;
      for (int64_t r = 0; r < size; ++r) {
        const int8_t* const codes = c.codes + (first + r) * c.stride;
        int8_t* const x = out.x + first * width + r * 4;
        for (int64_t k = 0; k < width; k += 4) std::memcpy(x + k * size, codes + k, 4);
        for (int64_t s = 0; s < segments; ++s) {
          const int64_t at = first * segments + s * size + r;
          out.sum[at] = sum_of(first + r, s);
          out.scale[at] = c.scale[(first + r) * c.groups + s * segment / c.group];
        }
      }
    }
  });
  return out;
}

std::optional<Codes> split_floats(const Rows& x, int64_t m, int64_t rows, int64_t segment) {
  if (split_rows() == nullptr) return std::nullopt;
  const int64_t K = x.K, segments = ceil_div(K, segment), stride = round_up(K, 8);
  auto* const digits = scratch<int8_t>(Slot::codes, rows * 3 * stride);
  auto* const scale = scratch<float>(Slot::code_scale, rows * 3 * segments);
  auto* const offset = scratch<int32_t>(Slot::code_offset, rows * 3 * segments);
  if (!split_rows()(
          {float_rows(x, m, rows), K, rows, K, segment, digits, stride, stride, scale, offset})) {
    return std::nullopt;
  }
  return Codes{digits, stride, scale, offset, segments, segment, rows, 3};
}

int64_t segment_of(int64_t K, int64_t weight_group, int64_t x_group, int64_t limit) {
  const int64_t segment = std::gcd(weight_group, x_group);
  if (segment <= limit) return segment;
  return segment == K ? limit : std::gcd(segment, limit);
}

}  // namespace llmq
