// decoder_layer: a whole layer of a Llama-like decoder, on weights of int8_linear or
// weight_only_linear; llmq/ops/decoder.py gives its meaning.
//
//     h = x + o(attention(rope(q(n)), rope(k(n)), v(n))),   n = rms_norm(x)
//     y = h + down(silu(gate(n')) · up(n')),                n' = rms_norm(h)
//
// One call a layer: a decoded token of SmolLM2 reads 3.5 MB of weights a layer, and what framework
// and small operators would add to that takes as long again. Reading weights bounds one token, int8
// products a prompt. Reached on one Emerald Rapids core, whole model, w8a8: 11.2 ms a token, of
// which 135 MB at the 13.9 GB/s that the run read from memory are 9.7; 1,600 tokens/s of a prompt
// of 512.
#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "driver.h"
#include "tiles.h"

namespace llmq {
namespace {

constexpr const char* kOp = "decoder_layer";
constexpr int64_t kMaxTokens = 256;       // a pass, as in int8_linear
constexpr int64_t kColumns = 4 * kPanel;  // of gate and up that a thread takes at once
constexpr int64_t kGrain = 1 << 20;       // float products: 20 us of one core

enum Which : int { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown, kLinears };

// The tensors of the layer's linear layers, by Which.
struct Tensors {
  const std::vector<Tensor>&weight, &scale, &zero_point, &bias;  // the last two may be empty
  const std::vector<int64_t>&bits, &group;                       // group -1: floating-point inputs

  bool integer(int i) const {  // int8_linear, else weight_only_linear
    return bits[i] == 8 && group[i] >= 0 && optional(zero_point, i) == std::nullopt &&
           scale[i].dim() == 2 && scale[i].size(1) == 1;
  }
  int64_t outputs(int i) const { return scale[i].size(0) * (scale[i].dim() == 3 ? kPanel : 1); }
  // Absent ones are empty tensors.
  static OptionalTensor optional(const std::vector<Tensor>& tensors, int i) {
    if (tensors.empty() || tensors[i].numel() == 0) return std::nullopt;
    return tensors[i];
  }
};

Rows float_view(const float* data, int64_t M, int64_t K) {
  return {reinterpret_cast<const char*>(data), Dtype::f32, M, K};
}

// Rows that several linear layers read: quantized once for all that want the same codes.
class Input {
 public:
  Input(const float* data, int64_t M, int64_t K) : rows_(float_view(data, M, K)) {}
  const Rows& rows() const { return rows_; }
  const Activations& codes(int64_t group) {
    if (group != group_) codes_ = quantize(rows_, 0, rows_.M, group);
    group_ = group;
    return codes_;
  }

 private:
  Rows rows_;
  int64_t group_ = -1;
  Activations codes_{};
};

// y [M, N] = linear layer i of the rows.
void linear(const Tensors& tensors, int i, Input& x, float* y) {
  const int64_t K = x.rows().K;
  const float* const bias = float_bias(kOp, Tensors::optional(tensors.bias, i), tensors.outputs(i));
  if (tensors.integer(i)) {
    const Int8Weight w(kOp, tensors.weight[i], tensors.scale[i], K);
    return int8_product(w, bias, x.codes(tensors.group[i]), x.rows().M, y);
  }
  const WeightOnly w(kOp, tensors.weight[i], tensors.scale[i],
                     Tensors::optional(tensors.zero_point, i), tensors.bits[i], K);
  const auto group = tensors.group[i] < 0 ? std::nullopt : std::optional<int64_t>(tensors.group[i]);
  weight_only_product(w, bias, x.rows(), group, y);
  x = Input(reinterpret_cast<const float*>(x.rows().data), x.rows().M, K);  // its scratch was used
}

// silu(gate) · up [M, N]; where both take the same codes, a block of columns at a time, which then
// stays in the second-level cache.
float* gated(const Tensors& tensors, Input& x) {
  const int64_t M = x.rows().M, N = tensors.outputs(kGate);
  float* const y = scratch<float>(Slot::product, M * N);
  if (!tensors.integer(kGate) || !tensors.integer(kUp) ||
      tensors.group[kGate] != tensors.group[kUp] || !tensors.bias.empty()) {
    float* const gate = scratch<float>(Slot::gate, M * N);
    float* const up = scratch<float>(Slot::up, M * N);
    linear(tensors, kGate, x, gate);
    linear(tensors, kUp, x, up);
    parallel_rows(M, N, [&](int64_t begin, int64_t end) {
      const int64_t at = begin * N;
      silu_mul()({gate + at, up + at, N, y + at, N, end - begin, N});
    });
    return y;
  }
  const Int8Weight gate(kOp, tensors.weight[kGate], tensors.scale[kGate], x.rows().K);
  const Int8Weight up(kOp, tensors.weight[kUp], tensors.scale[kUp], x.rows().K);
  const Activations& codes = x.codes(tensors.group[kGate]);
  // 256 tokens of 192 columns twice: 393 KB. Few tokens take all at once.
  const int64_t widest =
      std::max<int64_t>(kColumns, 3 * kColumns * kMaxTokens / M / kColumns * kColumns);
  const int64_t work = 2 * M * x.rows().K * kColumns;
  parallel_units(ceil_div(N, kColumns), work, 1 << 23, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(N, end * kColumns);
    for (int64_t n = begin * kColumns; n < last; n += widest) {
      const int64_t count = std::min(widest, last - n);
      float* const gate_columns = scratch<float>(Slot::gate, M * count);
      float* const up_columns = scratch<float>(Slot::up, M * count);
      int8_columns(gate, nullptr, codes, M, n, count, gate_columns, count);
      int8_columns(up, nullptr, codes, M, n, count, up_columns, count);
      silu_mul()({gate_columns, up_columns, count, y + n, N, M, count});
    }
  });
  return y;
}

// Floats of a tensor that may be of another dtype, converted into `slot`.
const float* floats(const Tensor& tensor, Slot slot, const char* name) {
  const Dtype dtype = float_dtype(kOp, name, tensor);
  LLMQ_CHECK(tensor.is_contiguous(), kOp, name, " must be contiguous");
  const int64_t count = tensor.numel();
  if (dtype == Dtype::f32) return static_cast<const float*>(tensor.const_data_ptr());
  float* const target = scratch<float>(slot, count);
  to_float()({tensor.const_data_ptr(), count, target, count, 1, count, dtype});
  return target;
}

void normalize(const Tensor& weight, float eps, const float* x, int64_t rows, int64_t K, float* y) {
  check_width(kOp, K, weight.numel(), 1);
  const float* const weights = floats(weight, Slot::norm_weight, "norm weight");
  parallel_rows(rows, K, [&](int64_t begin, int64_t end) {
    rms_norm()({x + begin * K, K, weights, eps, y + begin * K, K, end - begin, K});
  });
}

// Keys or values [B, heads, room, D] of which `length` are valid.
struct Cache {
  Cache(const Tensor& tensor, const char* name, int64_t B, int64_t heads, int64_t D, int64_t total)
      : data(static_cast<char*>(tensor.mutable_data_ptr())),
        dtype(float_dtype(kOp, name, tensor)),
        D(D) {
    LLMQ_CHECK(tensor.dim() == 4 && tensor.size(0) == B && tensor.size(1) == heads &&
                   tensor.size(2) >= total && tensor.size(3) == D,
               kOp, name, " must be [", B, ", ", heads, ", at least ", total, ", ", D, "], got ",
               shape_of(tensor));
    LLMQ_CHECK(tensor.stride(3) == 1 && tensor.stride(2) == D, kOp, name,
               " must have the numbers of a token side by side, and tokens");
    batch = tensor.stride(0);
    head = tensor.stride(1);
  }
  void* row(int64_t b, int64_t h, int64_t s) const {
    return data + (b * batch + h * head + s * D) * (dtype == Dtype::f32 ? 4 : 2);
  }

  char* data;
  Dtype dtype;
  int64_t D, batch, head;
};

// The rows that are added to scores: 0 or a large negative number for a mask of bools.
struct Mask {
  Mask(const OptionalTensor& mask, int64_t B, int64_t H, int64_t T, int64_t S) : rows(nullptr) {
    if (!mask.has_value()) return;
    const Tensor m = as_contiguous(*mask);
    LLMQ_CHECK(m.dim() == 4 && (m.size(0) == B || m.size(0) == 1) &&
                   (m.size(1) == H || m.size(1) == 1) && m.size(2) == T && m.size(3) == S,
               kOp, "mask must be [1 or ", B, ", 1 or ", H, ", ", T, ", ", S, "], got ",
               shape_of(m));
    head = m.size(1) == 1 ? 0 : T * S;
    batch = m.size(0) == 1 ? 0 : m.size(1) * T * S;
    token = S;
    const int64_t count = m.numel();
    float* const target = scratch<float>(Slot::mask, count);
    if (m.scalar_type() == ScalarType::Bool) {
      const auto* const source = static_cast<const bool*>(m.const_data_ptr());
      for (int64_t i = 0; i < count; ++i) target[i] = source[i] ? 0.0f : -1e30f;
    } else {
      to_float()({m.const_data_ptr(), count, target, count, 1, count, float_dtype(kOp, "mask", m)});
      for (int64_t i = 0; i < count; ++i) target[i] = std::max(target[i], -1e30f);
    }
    rows = target;
  }
  const float* row(int64_t b, int64_t h, int64_t t) const {
    return rows + b * batch + h * head + t * token;
  }

  const float* rows;
  int64_t batch = 0, head = 0, token = 0;
};

struct Shape {
  int64_t B, T, H, heads, D, start;  // heads: of keys and values; start: tokens in the cache before

  int64_t total() const { return start + T; }
};

// out [B·T, H·D] of query [B·T, H·D] over the cache.
void attend(const Shape& shape, const float* query, const Cache& keys, const Cache& values,
            const Mask& mask, float scaling, float* out) {
  const int64_t S = shape.total(), G = shape.H / shape.heads, D = shape.D, lanes = shape.T * G;
  // A cache of another dtype is converted a head at a time.
  const bool direct = keys.dtype == Dtype::f32 && values.dtype == Dtype::f32;
  float* const converted =
      direct ? nullptr : scratch<float>(Slot::attended, 2 * shape.B * shape.heads * S * D);
  if (!direct) {
    parallel_units(shape.B * shape.heads, 2 * S * D, 1 << 18, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / shape.heads, h = i % shape.heads;
        float* const target = converted + 2 * i * S * D;
        to_float()({keys.row(b, h, 0), D, target, D, S, D, keys.dtype});
        to_float()({values.row(b, h, 0), D, target + S * D, D, S, D, values.dtype});
      }
    });
  }
  const int64_t tiles = ceil_div(lanes, kAttentionLanes);
  const int64_t work = 2 * std::min(lanes, kAttentionLanes) * S * D;
  parallel_units(shape.B * shape.heads * tiles, work, kGrain, [&](int64_t begin, int64_t end) {
    float* const room = scratch<float>(Slot::attention, attention_scratch(D));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / tiles / shape.heads, h = i / tiles % shape.heads;
      const int64_t first = i % tiles * kAttentionLanes;
      const int64_t count = std::min(kAttentionLanes, lanes - first);
      const float* queries[kAttentionLanes];
      const float* masks[kAttentionLanes];
      float* targets[kAttentionLanes];
      int64_t visible[kAttentionLanes];
      for (int64_t lane = 0; lane < count; ++lane) {
        const int64_t t = (first + lane) / G, head = h * G + (first + lane) % G;
        const int64_t at = ((b * shape.T + t) * shape.H + head) * D;
        queries[lane] = query + at;
        targets[lane] = out + at;
        visible[lane] = mask.rows == nullptr ? shape.start + t + 1 : S;
        masks[lane] = mask.rows == nullptr ? nullptr : mask.row(b, head, t);
      }
      const float* const key = direct ? static_cast<const float*>(keys.row(b, h, 0))
                                      : converted + 2 * (b * shape.heads + h) * S * D;
      const float* const value =
          direct ? static_cast<const float*>(values.row(b, h, 0)) : key + S * D;
      attention()({key, value, D, D, queries, targets, visible,
                   mask.rows == nullptr ? nullptr : masks, count, scaling, room});
    }
  });
}

void add(const float* a, const float* b, int64_t rows, int64_t K, float* y) {
  parallel_rows(rows, K, [&](int64_t begin, int64_t end) {
    add_rows()({a + begin * K, b + begin * K, y + begin * K, (end - begin) * K});
  });
}

// Calls body(m, tokens) for passes of much the same size.
template <class Body>
void for_passes(int64_t M, const Body& body) {
  const Tiles passes(M, kMaxTokens);
  for (int64_t i = 0; i < passes.count; ++i) body(passes.begin(i), passes.size(i));
}

}  // namespace

Tensor decoder_layer(const Tensor& x, const std::vector<Tensor>& norms, const Tensor& cos,
                     const Tensor& sin, const Tensor& keys, const Tensor& values,
                     const OptionalTensor& mask, const std::vector<Tensor>& weights,
                     const std::vector<Tensor>& weight_scales,
                     const std::vector<Tensor>& weight_zero_points,
                     const std::vector<Tensor>& biases, const std::vector<int64_t>& bits,
                     const std::vector<int64_t>& activation_groups, int64_t start, double eps,
                     double scaling) {
  const TensorRows rows = rows_of(kOp, x);
  LLMQ_CHECK(x.dim() == 3, kOp, "x must be [batch, tokens, K], got ", shape_of(x));
  LLMQ_CHECK(start >= 0, kOp, "start must not be negative, got ", start);
  LLMQ_CHECK(norms.size() == 2 || norms.size() == 4, kOp, "norms must be 2 or 4, got ",
             norms.size());
  for (const auto* list : {&weights, &weight_scales, &weight_zero_points, &biases}) {
    const bool optional = list == &weight_zero_points || list == &biases;
    LLMQ_CHECK(list->size() == kLinears || (optional && list->empty()), kOp,
               "a layer has 7 linear layers, got ", list->size(), " tensors of a kind");
  }
  LLMQ_CHECK(bits.size() == kLinears && activation_groups.size() == kLinears, kOp,
             "bits and activation_groups must be 7 each");
  const Tensors tensors{weights, weight_scales, weight_zero_points,
                        biases,  bits,          activation_groups};
  const int64_t M = rows.M, K = rows.K, D = cos.size(cos.dim() - 1);
  check_width(kOp, K, norms[0].numel(), 1);
  const int64_t wide = tensors.outputs(kQuery), narrow = tensors.outputs(kKey);
  LLMQ_CHECK(D > 0 && D % 2 == 0 && wide % D == 0 && narrow % D == 0 && narrow > 0 &&
                 wide % narrow == 0 && tensors.outputs(kValue) == narrow &&
                 tensors.outputs(kOutput) == K && tensors.outputs(kGate) == tensors.outputs(kUp) &&
                 tensors.outputs(kDown) == K,
             kOp, "the linear layers do not fit each other, x [..., ", K, "] and heads of ", D);
  const Shape shape{x.size(0), x.size(1), wide / D, narrow / D, D, start};
  for (const Tensor* angles : {&cos, &sin}) {
    LLMQ_CHECK(angles->dim() == 3 && (angles->size(0) == shape.B || angles->size(0) == 1) &&
                   angles->size(1) == shape.T && angles->size(2) == D &&
                   angles->size(0) == cos.size(0),
               kOp, "cos and sin must be [1 or ", shape.B, ", ", shape.T, ", ", D, "], got ",
               shape_of(*angles));
  }
  const Tensor out = empty_output(rows, K);
  if (M == 0) return out;
  announce(kOp, M, K, K);
  const Cache key_cache(keys, "keys", shape.B, shape.heads, D, shape.total());
  const Cache value_cache(values, "values", shape.B, shape.heads, D, shape.total());

  const float* const input = float_rows(rows, 0, M);
  float* const hidden = rows.dtype == Dtype::f32 ? static_cast<float*>(out.mutable_data_ptr())
                                                 : scratch<float>(Slot::residual, M * K);
  float* const normed = scratch<float>(Slot::normed, std::min(M, kMaxTokens) * std::max(K, wide));
  float* const query = scratch<float>(Slot::query, 2 * M * wide);
  float* const attended = query + M * wide;
  const int64_t turned = cos.size(0) == 1 ? 0 : shape.T * D;  // of cos and sin from batch to batch
  const Tensor cosines = as_contiguous(cos), sines = as_contiguous(sin);

  for_passes(M, [&](int64_t m, int64_t tokens) {
    normalize(norms[0], eps, input + m * K, tokens, K, normed);
    Input normed_input(normed, tokens, K);
    float* const key = scratch<float>(Slot::key, tokens * narrow);
    float* const value = scratch<float>(Slot::value, tokens * narrow);
    linear(tensors, kQuery, normed_input, query + m * wide);
    linear(tensors, kKey, normed_input, key);
    linear(tensors, kValue, normed_input, value);
    if (norms.size() == 4) {
      normalize(norms[2], eps, query + m * wide, tokens * shape.H, D, query + m * wide);
      normalize(norms[3], eps, key, tokens * shape.heads, D, key);
    }
    const float* const cosine = floats(cosines, Slot::gate, "cos");
    const float* const sine = floats(sines, Slot::up, "sin");
    parallel_rows(tokens, wide, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t b = (m + row) / shape.T, token = (m + row) % shape.T,
                      at = b * turned + token * D;
        rope()({query + (m + row) * wide, cosine + at, sine + at, shape.H, D});
        rope()({key + row * narrow, cosine + at, sine + at, shape.heads, D});
        for (int64_t h = 0; h < shape.heads; ++h) {
          const int64_t from = row * narrow + h * D;
          from_float()(
              {key + from, D, key_cache.row(b, h, start + token), D, 1, D, key_cache.dtype});
          from_float()(
              {value + from, D, value_cache.row(b, h, start + token), D, 1, D, value_cache.dtype});
        }
      }
    });
  });

  attend(shape, query, key_cache, value_cache, Mask(mask, shape.B, shape.H, shape.T, shape.total()),
         scaling, attended);

  for_passes(M, [&](int64_t m, int64_t tokens) {
    Input attended_input(attended + m * wide, tokens, wide);
    float* const product = scratch<float>(Slot::product, tokens * K);
    linear(tensors, kOutput, attended_input, product);
    add(input + m * K, product, tokens, K, hidden + m * K);
    normalize(norms[1], eps, hidden + m * K, tokens, K, normed);
    Input normed_input(normed, tokens, K);
    Input gated_input(gated(tensors, normed_input), tokens, tensors.outputs(kGate));
    float* const down = scratch<float>(Slot::key, tokens * K);
    linear(tensors, kDown, gated_input, down);
    add(hidden + m * K, down, tokens, K, hidden + m * K);
  });
  if (rows.dtype != Dtype::f32) store_rows(hidden, K, out.mutable_data_ptr(), rows.dtype, M, K);
  return out;
}

}  // namespace llmq
