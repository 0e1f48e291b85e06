// What every driver needs on the way from tensors to pointers: checks, scratch memory, float rows
// in and out, quantized activations, panels, threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>

#include "kernels.h"
#include "ops.h"

// Throws std::invalid_argument, a ValueError in Python; the message is built only on failure.
#define LLMQ_CHECK(condition, op, ...) \
  do {                                 \
    if (!(condition)) [[unlikely]]     \
      llmq::fail(op, __VA_ARGS__);     \
  } while (false)

namespace llmq {

using torch::headeronly::ScalarType;

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "llmq." << op << ": ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// Scratch memory: one buffer a thread and slot, which grows to the largest call and is kept, so
// that a steady state allocates nothing. A slot's memory is valid until the same thread asks for
// that slot again; worker threads may read what the calling thread holds.
enum class Slot : int {
  codes,
  code_scale,
  code_offset,
  x,
  bias,
  y,
  weight,
  extra,
  tile_x,
  tile_scale,
  tile_sum,
  panel,
  // decoder_layer's own, which the linear layers that it calls leave alone
  residual,
  normed,
  query,
  key,
  value,
  mask,
  attended,
  attention,
  gate,
  up,
  product,
  norm_weight,
  count
};

void* scratch_bytes(Slot slot, int64_t bytes);  // 64-byte aligned

template <class T>
T* scratch(Slot slot, int64_t count) {
  return static_cast<T*>(scratch_bytes(slot, count * static_cast<int64_t>(sizeof(T))));
}

// Contiguous rows [M, K].
struct Rows {
  const char* data;
  Dtype dtype;
  int64_t M, K;

  int64_t element_size() const { return dtype == Dtype::f32 ? 4 : 2; }
  const void* row(int64_t m) const { return data + m * K * element_size(); }
};

constexpr int64_t kMaxDims = 64;  // of x, as torch's own tensor iterators take

// The rows of x [..., K], which lie in x or its contiguous copy.
struct TensorRows : Rows {
  Tensor tensor;
};

TensorRows rows_of(const char* op, const Tensor& x);
Tensor empty(const int64_t* sizes, int64_t dim, ScalarType type);
Tensor empty_output(const TensorRows& x, int64_t N);  // [..., N] in x's dtype

// What a tensor is, as errors give it: "int8", "[4, 8]", "int8 [4, 8]".
const char* dtype_name(ScalarType type);
std::string shape_of(const Tensor& tensor);
std::string shown(const Tensor& tensor);
Dtype float_dtype(const char* op, const char* name, const Tensor& tensor);        // or throws
const float* float_data(const char* op, const char* name, const Tensor& tensor);  // checks f32

// bias as float32 [N], converted into Slot::bias where it is not already so; null without a bias.
const float* float_bias(const char* op, const OptionalTensor& bias, int64_t N);

// The float32 rows [rows, K] of x from row m on: x itself, or converted into Slot::x.
const float* float_rows(const Rows& x, int64_t m, int64_t rows);

// weight as panels8 (bits 8) or panels4 (bits 4): its own memory, or canonical codes packed into
// Slot::weight. Checks dtype and shape.
const uint8_t* panels(const char* op, const Tensor& weight, int64_t bits, int64_t N, int64_t K);

// A tensor's contiguous self, and so valid data for as long as the result lives.
Tensor as_contiguous(const Tensor& tensor);

struct Activations {
  int8_t* codes;  // [rows, stride], zero beyond K
  int64_t stride;
  float* scale;     // [rows, groups]
  int32_t* offset;  // [rows, groups] −128 · Σ codes
  int64_t groups;
};

// Quantizes rows m … m + rows of x into the calling thread's scratch, in parallel where it pays.
// group_size 0 means one scale a token; it must divide K. `given`: the scale of all, or null.
Activations quantize(const Rows& x, int64_t m, int64_t rows, int64_t group_size,
                     const float* given = nullptr);

// Calls body(begin, end) over units of `work` each, on one thread unless there is more than
// `grain`: what one core does in some 50 us. Waking a second thread took 10 us while it spun and up
// to 100 us with passive waiting, on a two-core EPYC Genoa.
template <class Body>
void parallel_units(int64_t units, int64_t work, int64_t grain, const Body& body) {
  if (units * work <= grain) {
    body(0, units);
  } else {
    torch::stable::parallel_for(0, units, ceil_div(grain, work + 1), body);
  }
}

// The same over rows of K elements that are converted or moved.
template <class Body>
void parallel_rows(int64_t rows, int64_t K, const Body& body) {
  parallel_units(rows, K, 1 << 18, body);
}

// The same over the panels of N outputs: calls body(panel) for each, of `work` each.
template <class Body>
void for_panels(int64_t N, int64_t work, int64_t grain, const Body& body) {
  parallel_units(ceil_div(N, kPanel), work, grain, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) body(p);
  });
}

void check_group(const char* op, int64_t group_size, int64_t K);

// Throws unless K inputs fill `units` of `size` inputs each, the last one at least in part.
void check_width(const char* op, int64_t K, int64_t units, int64_t size);

// An activation_scale [1] that is given for all tokens, or null; checked against the group size.
const float* given_scale(const char* op, const OptionalTensor& scale,
                         std::optional<int64_t> group_size, int64_t K);

// int8_gemm for groups that end inside a block of 4 inputs, which no microkernel takes: right,
// slow.
void int8_gemm_any_group(const Int8Gemm& g, int64_t K, int64_t group);

// The weight of int8_linear, as panels8.
struct Int8Weight {
  Int8Weight(const char* op, const Tensor& weight, const Tensor& weight_scale, int64_t K);

  const uint8_t* panels;
  const float* scale;  // [N]
  int64_t N, K;
};

// y [tokens, y_stride] of outputs n … n + count, on the calling thread; 16 divides n.
void int8_columns(const Int8Weight& w, const float* bias, const Activations& a, int64_t tokens,
                  int64_t n, int64_t count, float* y, int64_t y_stride);
// y [tokens, N], on all threads where it pays.
void int8_product(const Int8Weight& w, const float* bias, const Activations& a, int64_t tokens,
                  float* y);

// Packs canonical codes [N, K] (int8) or [N, ceil(K/2)] (nibbles) into panels; in pack.cpp.
void pack_panels8(const uint8_t* codes, int64_t N, int64_t K, uint8_t* packed);
void pack_panels4(const uint8_t* nibbles, int64_t N, int64_t K, uint8_t* packed);

// Writes rows of float32 y [rows, N] (stride y_stride) into `target`, rows of N elements of
// `dtype`.
void store_rows(const float* y, int64_t y_stride, void* target, Dtype dtype, int64_t rows,
                int64_t N);

// LLMQ_PRINT_KERNELS=1: prints the kernel that runs, once a (op, M, N, K).
void announce(const char* op, int64_t M, int64_t N, int64_t K);

}  // namespace llmq
