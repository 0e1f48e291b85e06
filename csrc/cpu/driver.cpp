#include "driver.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <set>
#include <tuple>

#include "dispatch.h"

namespace llmq {
namespace {

// Rows of codes are a line apart modulo 4 KiB: at K = 4096 they would otherwise share one L1 set.
constexpr int64_t kLine = 64;

struct Buffer {
  void* data = nullptr;
  int64_t bytes = 0;
  ~Buffer() { std::free(data); }
};

thread_local Buffer buffers[static_cast<int>(Slot::count)];

ScalarType scalar_type(Dtype dtype) {
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  return kTypes[static_cast<int>(dtype)];
}

}  // namespace

const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(type);
  }
}

std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (const int64_t size : tensor.sizes()) {
    text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  }
  return text + "]";
}

std::string shown(const Tensor& tensor) {
  return std::string(dtype_name(tensor.scalar_type())) + " " + shape_of(tensor);
}

Dtype float_dtype(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      fail(op, name, " must be float32, bfloat16 or float16, got ",
           dtype_name(tensor.scalar_type()));
  }
}

void* scratch_bytes(Slot slot, int64_t bytes) {
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (bytes > buffer.bytes) {
    std::free(buffer.data);
    buffer.bytes = round_up(bytes + bytes / 4, 4096);
    buffer.data = std::aligned_alloc(4096, static_cast<size_t>(buffer.bytes));
    if (buffer.data == nullptr) {
      buffer.bytes = 0;
      throw std::bad_alloc();
    }
  }
  return buffer.data;
}

Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

TensorRows rows_of(const char* op, const Tensor& x) {
  const int64_t dim = x.dim();
  LLMQ_CHECK(dim >= 1, op, "x must have at least one dimension, got a scalar");
  LLMQ_CHECK(dim <= kMaxDims, op, "x must have at most 64 dimensions, got ", dim);
  TensorRows rows{{nullptr, float_dtype(op, "x", x), 1, x.size(dim - 1)}, as_contiguous(x)};
  for (int64_t i = 0; i + 1 < dim; ++i) rows.M *= x.size(i);
  rows.data = static_cast<const char*>(rows.tensor.const_data_ptr());
  return rows;
}

Tensor empty(const int64_t* sizes, int64_t dim, ScalarType type) {
  int64_t strides[kMaxDims];
  for (int64_t i = dim - 1, stride = 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  AtenTensorHandle handle;
  // Half the cost of torch::stable::empty, which looks its operator up by name at each call.
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty_output(const TensorRows& x, int64_t N) {
  int64_t sizes[kMaxDims];
  const int64_t dim = x.tensor.dim();
  for (int64_t i = 0; i + 1 < dim; ++i) sizes[i] = x.tensor.size(i);
  sizes[dim - 1] = N;
  return empty(sizes, dim, scalar_type(x.dtype));
}

const float* float_data(const char* op, const char* name, const Tensor& tensor) {
  LLMQ_CHECK(tensor.scalar_type() == ScalarType::Float, op, name, " must be float32, got ",
             shown(tensor));
  LLMQ_CHECK(tensor.is_contiguous(), op, name, " must be contiguous; call .contiguous() on it");
  return static_cast<const float*>(tensor.const_data_ptr());
}

const float* float_bias(const char* op, const OptionalTensor& bias, int64_t N) {
  if (!bias.has_value()) return nullptr;
  LLMQ_CHECK(bias->dim() == 1 && bias->size(0) == N, op, "bias must be [", N, "], got ",
             shape_of(*bias));
  const Dtype dtype = float_dtype(op, "bias", *bias);
  const int64_t stride = bias->stride(0);
  if (dtype == Dtype::f32 && (stride == 1 || N <= 1)) {
    return static_cast<const float*>(bias->const_data_ptr());
  }
  // N rows of one column, so that any stride works.
  float* target = scratch<float>(Slot::bias, N);
  if (stride == 1) {
    to_float()({bias->const_data_ptr(), N, target, N, 1, N, dtype});
  } else {
    to_float()({bias->const_data_ptr(), stride, target, 1, N, 1, dtype});
  }
  return target;
}

const float* float_rows(const Rows& x, int64_t m, int64_t rows) {
  if (x.dtype == Dtype::f32) return static_cast<const float*>(x.row(m));
  float* target = scratch<float>(Slot::x, rows * x.K);
  to_float()({x.row(m), x.K, target, x.K, rows, x.K, x.dtype});
  return target;
}

void check_width(const char* op, int64_t K, int64_t units, int64_t size) {
  const int64_t most = units * size, least = std::max<int64_t>((units - 1) * size + 1, 0);
  if (least <= K && K <= most) [[likely]]
    return;
  const std::string first = least < most ? std::to_string(least) + " to " : "";
  fail(op, "expected ", first, most, " input features, got ", K);
}

const uint8_t* panels(const char* op, const Tensor& weight, int64_t bits, int64_t N, int64_t K) {
  LLMQ_CHECK(bits == 8 || bits == 4, op, "bits must be 8 or 4, got ", bits);
  const bool packed =
      weight.dim() == 4 && weight.size(2) == kPanel && weight.size(3) == kBlockBytes / kPanel;
  LLMQ_CHECK(weight.scalar_type() == ScalarType::Char && (packed || weight.dim() == 2), op,
             "weight must be int8 [N, K] or [N, K / 2], or panels [N / 16, blocks, 16, 4], got ",
             shown(weight));
  check_width(op, K, weight.size(1), (packed ? 32 : 8) / bits);
  const int64_t rows = packed ? ceil_div(N, kPanel) : N;
  LLMQ_CHECK(weight.size(0) == rows, op, "weight must have ", rows, packed ? " panels" : " rows",
             " for ", N, " output features, got ", weight.size(0));
  LLMQ_CHECK(weight.is_contiguous(), op, "weight must be contiguous; call .contiguous() on it");
  const auto* data = static_cast<const uint8_t*>(weight.const_data_ptr());
  if (packed) return data;
  const int64_t bytes = ceil_div(N, kPanel) * ceil_div(K * bits, 32) * kBlockBytes;
  auto* target = scratch<uint8_t>(Slot::weight, bytes);
  (bits == 8 ? pack_panels8 : pack_panels4)(data, N, K, target);
  return target;
}

void check_group(const char* op, int64_t group_size, int64_t K) {
  LLMQ_CHECK(group_size == 0 || (group_size > 0 && K % group_size == 0), op,
             "activation group size ", group_size, " does not divide K=", K);
}

const float* given_scale(const char* op, const OptionalTensor& scale,
                         std::optional<int64_t> group_size, int64_t K) {
  if (!scale.has_value()) return nullptr;
  LLMQ_CHECK(scale->scalar_type() == ScalarType::Float && scale->dim() == 1 && scale->size(0) == 1,
             op, "activation_scale must be float32 [1], got ", shown(*scale));
  LLMQ_CHECK(group_size == 0 || group_size == K, op,
             "activation_scale goes with an activation group size of 0, got ",
             group_size.has_value() ? std::to_string(*group_size) : "None");
  return static_cast<const float*>(scale->const_data_ptr());
}

Activations quantize(const Rows& x, int64_t m, int64_t rows, int64_t group_size,
                     const float* given) {
  const int64_t group = group_size == 0 ? x.K : group_size;
  const int64_t groups = group == 0 ? 1 : x.K / group;
  // 8: a block of panels4 reads that many codes at once.
  const int64_t stride = round_up(x.K, kLine) + kLine, columns = round_up(x.K, 8);
  const Activations out{scratch<int8_t>(Slot::codes, rows * stride), stride,
                        scratch<float>(Slot::code_scale, rows * groups),
                        scratch<int32_t>(Slot::code_offset, rows * groups), groups};
  QuantizeRowsFn* const kernel = quantize_rows();
  parallel_rows(rows, x.K, [&](int64_t begin, int64_t end) {
    kernel({x.row(m + begin), x.K, x.dtype, end - begin, x.K, group, out.codes + begin * stride,
            stride, columns, out.scale + begin * groups, out.offset + begin * groups, given});
  });
  return out;
}

void store_rows(const float* y, int64_t y_stride, void* target, Dtype dtype, int64_t rows,
                int64_t N) {
  from_float()({y, y_stride, target, N, rows, N, dtype});
}

void announce(const char* op, int64_t M, int64_t N, int64_t K) {
  static const bool wanted = [] {
    const char* value = std::getenv("LLMQ_PRINT_KERNELS");
    return value != nullptr && std::strcmp(value, "1") == 0;
  }();
  if (!wanted) [[likely]]
    return;
  static std::mutex mutex;
  static std::set<std::tuple<std::string, int64_t, int64_t, int64_t>> seen;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!seen.emplace(op, M, N, K).second) return;
  std::printf("llmq: %s M=%lld N=%lld K=%lld -> %s\n", op, static_cast<long long>(M),
              static_cast<long long>(N), static_cast<long long>(K), isa_name(current_isa()));
  std::fflush(stdout);
}

}  // namespace llmq
