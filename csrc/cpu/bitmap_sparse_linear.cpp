// bitmap_sparse_linear: y = x Wᵀ where W keeps any subset of its weights, int8 or floating point.
//
// int8 values with int8 activations run as int8_linear does, over weights that are expanded in
// registers (few tokens) or, four panels at a time, in the second-level cache (many).
// Floating-point activations become three int8 rows each, so that they share those kernels.
// Floating-point values run row by row: layers keep such weights dense.
#include <algorithm>
#include <numeric>
#include <vector>

#include "bitmap.h"
#include "dispatch.h"
#include "tiles.h"

namespace llmq {
namespace {

constexpr const char* kOp = "bitmap_sparse_linear";

// int8 rows a pass, as in int8_linear; a token of floats takes three.
constexpr int64_t kMaxRows = 256;
constexpr int64_t kDigits = 3;

// Inputs that share a scale when floats are split: an outlier costs few others their precision.
constexpr int64_t kSegment = 256;

// Up to so many rows, expanding the weight in registers for each tile of them beats storing it.
constexpr int64_t kFewRows = 12;

// Panels that are expanded, and that one thread takes, at once: int8_gemm's tile.
constexpr int64_t kPanels = 4;

struct Weight {
  BitmapPanels kept;
  const float* scale;  // [N]
  int64_t N, K;

  int64_t blocks() const { return ceil_div(K, 4); }  // a panel
};

// Calls body(first, last) over outputs, whole groups of panels, in parallel where it pays.
template <class Body>
void over_outputs(const Weight& w, int64_t rows, const Body& body) {
  const int64_t units = ceil_div(w.N, kPanels * kPanel), products = rows * w.K * kPanels * kPanel;
  parallel_units(units, products, kGrain, [&](int64_t begin, int64_t end) {
    body(begin * kPanels * kPanel, std::min(w.N, end * kPanels * kPanel));
  });
}

// Outputs first … last (at most kPanels panels) as panels8 in this thread's scratch.
const uint8_t* expand(const Weight& w, int64_t first, int64_t last) {
  const int64_t p = first / kPanel, blocks = ceil_div(last - first, kPanel) * w.blocks();
  auto* const panels = scratch<uint8_t>(Slot::panel, blocks * kBlockBytes);
  bitmap_expand()(
      {w.kept.weight + w.kept.start[p], w.kept.mask + p * w.blocks() * 8, blocks, panels});
  return panels;
}

// y [rows, N] = codes · weight, scaled, with bias.
void multiply(const Weight& w, const Activations& a, int64_t rows, int64_t group, const float* bias,
              float* y) {
  const bool whole_blocks = a.groups == 1 || group % 4 == 0;
  over_outputs(w, rows, [&](int64_t begin, int64_t end) {
    const auto gemm = [&](const uint8_t* weight, int64_t n, int64_t last) {
      return Int8Gemm{.weight = weight,
                      .x = a.codes,
                      .x_stride = a.stride,
                      .x_scale = a.scale,
                      .x_offset = a.offset,
                      .weight_scale = w.scale + n,
                      .bias = bias == nullptr ? nullptr : bias + n,
                      .y = y + n,
                      .y_stride = w.N,
                      .M = rows,
                      .N = last - n,
                      .K4 = w.blocks(),
                      .groups = a.groups};
    };
    if (whole_blocks && rows <= kFewRows) {
      const int64_t p = begin / kPanel;
      return bitmap_gemm()(
          {gemm(w.kept.weight, begin, end), w.kept.mask + p * w.blocks() * 8, w.kept.start + p});
    }
    for (int64_t n = begin; n < end; n += kPanels * kPanel) {
      const int64_t last = std::min(end, n + kPanels * kPanel);
      const Int8Gemm dense = gemm(expand(w, n, last), n, last);
      if (whole_blocks) {
        int8_gemm()(dense);
      } else {
        int8_gemm_any_group(dense, w.K, group);
      }
    }
  });
}

// Rows m … m + tokens of x as kDigits · tokens rows of codes, digit by digit: each quantizes what
// those before it left over, and their sum is x to 24 bits of the largest input of its segment.
Activations three_digits(const Rows& x, int64_t m, int64_t tokens, int64_t segment) {
  const int64_t K = x.K, groups = K / segment;
  const int64_t stride = round_up(K, kBlockBytes) + kBlockBytes;
  const Activations out{scratch<int8_t>(Slot::codes, kDigits * tokens * stride), stride,
                        scratch<float>(Slot::code_scale, kDigits * tokens * groups),
                        scratch<int32_t>(Slot::code_offset, kDigits * tokens * groups), groups};
  const float* const source = float_rows(x, m, tokens);
  float* const left = scratch<float>(Slot::tile_x, tokens * K);
  QuantizeRowsFn* const kernel = quantize_rows();
  parallel_rows(tokens, K * kDigits, [&](int64_t begin, int64_t end) {
    const float* rest = source;
    for (int64_t d = 0; d < kDigits; ++d) {
      const int64_t row = d * tokens + begin;
      kernel({rest + begin * K, K, Dtype::f32, end - begin, K, segment, out.codes + row * stride,
              stride, round_up(K, 8), out.scale + row * groups, out.offset + row * groups});
      for (int64_t t = begin; t < end && d + 1 < kDigits; ++t) {
        const int8_t* const codes = out.codes + (d * tokens + t) * stride;
        const float* const scale = out.scale + (d * tokens + t) * groups;
        for (int64_t g = 0; g < groups; ++g) {
          for (int64_t k = g * segment; k < (g + 1) * segment; ++k) {
            left[t * K + k] = rest[t * K + k] - static_cast<float>(codes[k]) * scale[g];
          }
        }
      }
      rest = left;
    }
  });
  return out;
}

// Whether a row has what codes cannot hold: NaN, infinity, segments below quantize_rows' 1e-30, or
// inputs whose dot product would overflow before weight_scale is applied.
bool beyond_codes(const float* scale, int64_t groups) {
  return std::any_of(scale, scale + groups,
                     [](float s) { return !(s <= 1e28f) || (s > 0 && s < 1e-32f); });
}

// One row in floating point throughout: slow, and NaN and infinity come out as in a dense product.
void multiply_exactly(const Weight& w, const float* x, const float* bias, float* y) {
  over_outputs(w, 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kPanel) {
      const int64_t last = std::min(end, first + kPanel);
      const uint8_t* const panel = expand(w, first, last);
      for (int64_t n = first; n < last; ++n) {
        float sum = 0;
        for (int64_t k = 0; k < w.K; ++k) {
          const uint8_t byte = panel[k / 4 * kBlockBytes + (n - first) * 4 + k % 4];
          sum += static_cast<float>(byte - 128) * w.scale[n] * x[k];
        }
        y[n] = sum + (bias == nullptr ? 0.0f : bias[n]);
      }
    }
  });
}

void multiply_floats(const Weight& w, const Rows& x, int64_t m, const Result& result) {
  const int64_t N = w.N, tokens = result.rows, power = std::gcd(w.K, kSegment);
  const int64_t segment = power >= 32 ? power : w.K;
  const Activations a = three_digits(x, m, tokens, segment);
  float* const digits = scratch<float>(Slot::extra, kDigits * tokens * N);
  multiply(w, a, kDigits * tokens, segment, nullptr, digits);
  for (int64_t t = 0; t < tokens; ++t) {
    const float *first = digits + t * N, *second = first + tokens * N, *third = second + tokens * N;
    float* const y = result.y + t * N;
    for (int64_t n = 0; n < N; ++n) y[n] = third[n] + second[n] + first[n];
    for (int64_t n = 0; result.bias != nullptr && n < N; ++n) y[n] += result.bias[n];
  }
  for (int64_t t = 0; t < tokens; ++t) {
    if (!beyond_codes(a.scale + t * a.groups, a.groups)) continue;
    multiply_exactly(w, float_rows(x, m + t, 1), result.bias, result.y + t * N);
  }
}

void multiply_rows(const Tensor& weight, Dtype dtype, const uint8_t* mask, const int64_t* offsets,
                   int64_t K, const float* x, const Result& result) {
  const int64_t N = result.N, size = dtype == Dtype::f32 ? 4 : 2;
  const auto* values = static_cast<const char*>(weight.const_data_ptr());
  parallel_units(N, result.rows * K, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> column;
    for (int64_t n = begin; n < end; ++n) {
      const int64_t count = offsets[n + 1] - offsets[n];
      float* const kept = scratch<float>(Slot::panel, count);
      to_float()({values + offsets[n] * size, count, kept, count, 1, count, dtype});
      column.clear();
      for (int64_t k = 0; k < K; ++k) {
        if ((mask[n * ceil_div(K, 8) + k / 8] >> (k % 8) & 1) != 0) {
          column.push_back(static_cast<int32_t>(k));
        }
      }
      for (int64_t m = 0; m < result.rows; ++m) {
        float sum = 0;
        for (int64_t i = 0; i < count; ++i) sum += kept[i] * x[m * K + column[i]];
        result.y[m * N + n] = sum + (result.bias == nullptr ? 0.0f : result.bias[n]);
      }
    }
  });
}

Tensor float_values(const TensorRows& x, const Tensor& weight, const Tensor& weight_bitmask,
                    const Tensor& row_offsets, const OptionalTensor& bias) {
  const int64_t N = std::max<int64_t>(row_offsets.numel() - 1, 0);
  const Tensor values = as_contiguous(weight), bits = as_contiguous(weight_bitmask),
               rows = as_contiguous(row_offsets);
  const Dtype dtype = float_dtype(kOp, "weight", values);
  check_bitmap(kOp, values, bits, rows, N, x.K);
  const float* const biases = float_bias(kOp, bias, N);
  const Tensor y = empty_output(x, N);
  if (x.M == 0 || N == 0) return y;
  announce(kOp, x.M, N, x.K);
  const auto* mask = static_cast<const uint8_t*>(bits.const_data_ptr());
  const auto* offsets = static_cast<const int64_t*>(rows.const_data_ptr());
  for (int64_t m = 0; m < x.M; m += kMaxRows) {
    const Result result(y.mutable_data_ptr(), x, m, std::min(kMaxRows, x.M - m), N, biases);
    multiply_rows(values, dtype, mask, offsets, x.K, float_rows(x, m, result.rows), result);
    result.store();
  }
  return y;
}

}  // namespace

Tensor bitmap_sparse_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_bitmask,
                            const Tensor& row_offsets, const OptionalTensor& weight_scale,
                            const OptionalTensor& bias,
                            std::optional<int64_t> activation_group_size,
                            const OptionalTensor& activation_scale) {
  const TensorRows rows = rows_of(kOp, x);
  const bool codes = activation_group_size.has_value();
  const int64_t group = activation_group_size.value_or(0);
  check_group(kOp, group, rows.K);
  const float* const given = given_scale(kOp, activation_scale, activation_group_size, rows.K);
  LLMQ_CHECK((weight.scalar_type() == ScalarType::Char) == weight_scale.has_value(), kOp,
             "int8 values need a weight_scale and floating-point values take none, got ",
             dtype_name(weight.scalar_type()), weight_scale.has_value() ? " with" : " without",
             " a scale");
  if (!weight_scale.has_value()) {
    LLMQ_CHECK(!codes, kOp, "int8 activations need int8 values");
    return float_values(rows, weight, weight_bitmask, row_offsets, bias);
  }
  LLMQ_CHECK(weight_scale->scalar_type() == ScalarType::Float && weight_scale->dim() == 2 &&
                 weight_scale->size(1) == 1,
             kOp, "weight_scale must be float32 [N, 1], got ", shown(*weight_scale));
  const int64_t M = rows.M, N = weight_scale->size(0), K = rows.K;
  Tensors3 stored{weight, weight_bitmask, row_offsets};
  if (weight_bitmask.dim() == 2) {
    check_bitmap_shapes(kOp, weight, weight_bitmask, row_offsets, N, K);
    stored = pack_bitmap_panels(weight, weight_bitmask, row_offsets, K);
  }
  const Weight w{
      check_bitmap_panels(kOp, std::get<0>(stored), std::get<1>(stored), std::get<2>(stored), N, K),
      float_data(kOp, "weight_scale", *weight_scale), N, K};
  const float* const biases = float_bias(kOp, bias, N);
  const Tensor y = empty_output(rows, N);
  if (M == 0 || N == 0) return y;
  announce(kOp, M, N, K);

  const int64_t pass = codes || K == 0 ? kMaxRows : kMaxRows / kDigits;
  for (int64_t m = 0; m < M; m += pass) {
    const Result result(y.mutable_data_ptr(), rows, m, std::min(pass, M - m), N, biases);
    if (codes || K == 0) {
      multiply(w, quantize(rows, m, result.rows, group, given), result.rows, group == 0 ? K : group,
               biases, result.y);
    } else {
      multiply_floats(w, rows, m, result);
    }
    result.store();
  }
  return y;
}

}  // namespace llmq
