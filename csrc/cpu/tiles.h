// What weight_only_linear and codebook_linear share: weights with scales of groups, rows cut into
// tiles whose inputs lie side by side, the float path, results on their way out.
#pragma once

#include <algorithm>
#include <optional>

#include "dispatch.h"
#include "driver.h"

namespace llmq {

// Rows cut as evenly as can be into as few tiles of at most `limit` as will do.
struct Tiles {
  Tiles(int64_t rows, int64_t limit) : rows(rows), count(ceil_div(rows, limit)) {}
  int64_t begin(int64_t tile) const { return tile * rows / count; }
  int64_t size(int64_t tile) const { return begin(tile + 1) - begin(tile); }

  int64_t rows, count;
};

// Panels of codes, and scales of groups of inputs: canonical [N, groups], or panels [ceil(N/16),
// groups, 16] of whole panels, which spare each call their transposition.
struct GroupedWeight {
  GroupedWeight(const char* op, const Tensor& weight, const Tensor& weight_scale, int64_t bits,
                int64_t K);
  int64_t group() const { return std::max<int64_t>(K / groups, 1); }
  int64_t block() const { return 32 / bits; }  // inputs of a block of a panel
  const uint8_t* panel(int64_t p) const { return codes + p * ceil_div(K, block()) * kBlockBytes; }

  const uint8_t* codes;
  const float* scale;
  bool in_panels;  // whether scales stand as panels do
  int64_t bits, N, K, groups;
};

// y [rows, N] of one pass in float32: the output itself, or scratch that `store` converts into it.
struct Result {
  Result(void* y, const Rows& x, int64_t m, int64_t rows, int64_t N, const float* bias);
  void store() const;
  // Adds the `digits` rows of each token of a panel's tile and the bias, and writes the tokens.
  void put(const float* tile, int64_t digits, int64_t token, int64_t tokens, int64_t panel) const;

  char* target;
  float* y;
  const float* bias;
  Dtype dtype;
  int64_t rows, N;
};

// The weight of weight_only_linear.
struct WeightOnly : GroupedWeight {
  WeightOnly(const char* op, const Tensor& weight, const Tensor& weight_scale,
             const OptionalTensor& weight_zero_point, int64_t bits, int64_t K);

  const int8_t* zero_point;  // in panels where the scales are, or null
};

// y [M, N] in x's dtype; x_group as weight_only_linear's activation_group_size.
void weight_only_product(const WeightOnly& w, const float* bias, const Rows& x,
                         std::optional<int64_t> x_group, void* y);

inline constexpr int64_t kGrain = 1 << 20;  // products that one thread takes before a second helps

// Tokens a pass: bounds the scratch and keeps x in the second-level cache; a whole number of tiles.
inline constexpr int64_t kPassRows = 20 * kTile;

// Integers

// int8 rows of x, `digits` a token, before they are cut into tiles.
struct Codes {
  const int8_t* codes;  // [tokens · digits, stride], zero up to whole blocks
  int64_t stride;
  const float* scale;     // [tokens · digits, groups]
  const int32_t* offset;  // [tokens · digits, groups] −128 · Σ codes
  int64_t groups, group;
  int64_t tokens, digits;
};

struct CodeTiles {
  int8_t* x;     // tile t at begin(t) · digits · width, begin in tokens
  float* scale;  // tile t at begin(t) · digits · segments
  int32_t* sum;  // likewise
  int64_t width, segments;
};

CodeTiles code_tiles(const Codes& codes, const Tiles& tiles, int64_t K, int64_t segment);

// Inputs that share a scale when floats are split: short enough that an outlier costs few others.
inline constexpr int64_t kSplitSegment = 256;

// Floats of rows m … m + rows as three int8 digits, a scale a segment; nothing where those cannot
// hold them, or this instruction set has no split_rows.
std::optional<Codes> split_floats(const Rows& x, int64_t m, int64_t rows, int64_t segment);

// The longest segment within both kinds of group and `limit`, a power of two.
int64_t segment_of(int64_t K, int64_t weight_group, int64_t x_group, int64_t limit);

// Floats

// x's rows m … m + rows as float tiles in Slot::tile_x: tile t at begin(t) · round_up(K, 8).
const float* float_tiles(const Rows& x, int64_t m, const Tiles& tiles);

// The float path. prepare(panel) makes the panel's scales ready in Slot::panel of its thread and
// returns the call that dequantize, and for one row gemv, take; gemv may be null.
inline constexpr int64_t kChunk = 256;  // inputs dequantized at a time: 16 KiB, half of a small L1

template <class Prepare, class Call>
void float_panels(const Rows& x, int64_t m, const Result& result, const Prepare& prepare,
                  void (*gemv)(const Call&), void (*dequantize)(const Call&)) {
  PanelGemmFn* const gemm = panel_gemm();
  const Tiles tiles(result.rows, kTile);
  const float* const inputs = float_tiles(x, m, tiles);
  const int64_t K = x.K, stride = round_up(K, 8);
  for_panels(result.N, result.rows * K * kPanel, kGrain, [&](int64_t panel) {
    Call call = prepare(panel);
    if (result.rows == 1 && gemv != nullptr) {
      alignas(64) float y[kPanel];
      call.x = inputs;
      call.y = y;
      gemv(call);
      return result.put(y, 1, 0, 1, panel);
    }
    alignas(64) float dense[kChunk * kPanel];
    alignas(64) float y[kPassRows * kPanel];
    std::fill(y, y + result.rows * kPanel, 0.0f);
    for (int64_t k = 0; k < K; k += kChunk) {
      call.k = k;
      call.count = std::min(kChunk, K - k);
      call.dense = dense;
      dequantize(call);
      for (int64_t t = 0; t < tiles.count; ++t) {
        const int64_t row = tiles.begin(t), size = tiles.size(t);
        gemm({dense, inputs + row * stride + k * size, call.count, size, y + row * kPanel});
      }
    }
    result.put(y, 1, 0, result.rows, panel);
  });
}

}  // namespace llmq
