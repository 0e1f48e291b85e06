// Compares every microkernel of every instruction set that runs here with the portable one.
//
// Inputs are small integers and scales powers of two where a kernel adds floats, so that each sum
// is exact in any order: results must be equal to the bit. Buffers end at an unreadable page.
// Prints the instruction sets compared, a line each; exits with 1 at the first difference.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>

#include "../../csrc/cpu/dispatch.h"

using namespace llmq;

namespace {

std::mt19937 generator(1);
std::string isa, what;

int64_t any(int64_t least, int64_t most) {
  return least + static_cast<int64_t>(generator() % static_cast<uint32_t>(most - least + 1));
}

// `size` elements that end where memory does, filled with 0xa5 bytes.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : size_(size) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t bytes = size * static_cast<int64_t>(sizeof(T));
    mapped_ = round_up(bytes, page) + page;
    start_ = static_cast<char*>(mmap(nullptr, static_cast<size_t>(mapped_), PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (start_ == MAP_FAILED || mprotect(start_ + mapped_ - page, page, PROT_NONE) != 0) abort();
    data_ = reinterpret_cast<T*>(start_ + mapped_ - page - bytes);
    std::memset(static_cast<void*>(data_), 0xa5, static_cast<size_t>(bytes));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { munmap(start_, static_cast<size_t>(mapped_)); }

  template <class Make>
  Buffer& fill(const Make& make) {
    for (int64_t i = 0; i < size_; ++i) data_[i] = static_cast<T>(make());
    return *this;
  }
  operator T*() { return data_; }
  T* operator+() { return data_; }
  int64_t size() const { return size_; }

 private:
  int64_t size_, mapped_;
  char* start_;
  T* data_;
};

bool same(float a, float b) {
  return std::memcmp(&a, &b, 4) == 0 || (std::isnan(a) && std::isnan(b)) || (a == 0 && b == 0);
}
template <class T>
bool same(T a, T b) {
  return a == b;
}

template <class T>
void expect_same(Buffer<T>& got, Buffer<T>& expected, const char* name) {
  for (int64_t i = 0; i < got.size(); ++i) {
    if (same(got[i], expected[i])) continue;
    std::printf("%s, %s: %s[%lld] = %g, portable has %g\n", isa.c_str(), what.c_str(), name,
                static_cast<long long>(i), static_cast<double>(got[i]),
                static_cast<double>(expected[i]));
    exit(1);
  }
}

int64_t code() { return any(-127, 127); }
float power() { return any(0, 1) == 0 ? 0.5f : 1.0f; }

float any_float() {
  switch (any(0, 40)) {
    case 0:
      return 0.0f;
    case 1:
      return -0.0f;
    case 2:
      return 1e-38f;
    case 3:
      return 65519.9f;
    default:
      return std::ldexp(static_cast<float>(code()) + 0.37f, static_cast<int>(any(-20, 20)));
  }
}

template <class T>
void convert_rows(Dtype dtype) {
  const int64_t rows = any(1, 3), columns = any(0, 37), stride = columns + any(0, 3);
  what = "convert_rows of " + std::to_string(rows) + " x " + std::to_string(columns);
  const int64_t size = rows == 0 ? 0 : (rows - 1) * stride + columns;
  Buffer<T> narrow(size), narrow_expected(size);
  Buffer<float> wide(size), expected(size);
  if constexpr (std::is_same_v<T, float>) {
    narrow.fill(any_float);
  } else {
    narrow.fill([] { return generator(); });
  }
  to_float_portable({narrow, stride, expected, stride, rows, columns, dtype});
  to_float()({narrow, stride, wide, stride, rows, columns, dtype});
  expect_same(wide, expected, "to_float");
  wide.fill([] { return any(0, 30) == 0 ? NAN : any(0, 30) == 0 ? INFINITY : any_float(); });
  Buffer<T> back(size);
  from_float_portable({wide, stride, narrow_expected, stride, rows, columns, dtype});
  from_float()({wide, stride, back, stride, rows, columns, dtype});
  for (int64_t m = 0; m < rows; ++m) {  // the payload of a NaN may differ
    for (int64_t k = 0; k < columns; ++k) {
      if (std::isnan(wide[m * stride + k])) {
        back[m * stride + k] = narrow_expected[m * stride + k] = T(0);
      }
    }
  }
  expect_same(back, narrow_expected, "from_float");
}

template <class T>
void quantize(Dtype dtype) {
  const int64_t rows = any(1, 4), groups = any(1, 4), group = any(1, 70), K = groups * group;
  const int64_t stride = K + any(0, 3), codes_columns = round_up(K, 8);
  what = "quantize_rows of " + std::to_string(rows) + " x " + std::to_string(K) + " in groups of " +
         std::to_string(group);
  Buffer<T> x((rows - 1) * stride + K);
  if constexpr (std::is_same_v<T, float>) {
    const int64_t rare = any(0, 2) == 0 ? 50 : 1000000;
    x.fill([&] { return any(0, rare) == 0 ? (any(0, 1) == 0 ? NAN : INFINITY) : any_float(); });
  } else {
    x.fill([] { return generator() & 0xbbff; });  // few are infinite in either type
  }
  if (any(0, 5) == 0) x.fill([] { return 0; });
  Buffer<int8_t> codes(rows * codes_columns), codes_expected(rows * codes_columns);
  Buffer<float> scale(rows * groups), scale_expected(rows * groups);
  Buffer<int32_t> offset(rows * groups), offset_expected(rows * groups);
  const float given = any(0, 9) == 0 ? any_float() : std::ldexp(0.7f, static_cast<int>(any(-9, 9)));
  QuantizeRows q{
      x,     stride,        dtype,         rows,  K,      group,
      codes, codes_columns, codes_columns, scale, offset, any(0, 2) == 0 ? &given : nullptr};
  quantize_rows()(q);
  q.codes = codes_expected;
  q.scale = scale_expected;
  q.offset = offset_expected;
  quantize_rows_portable(q);
  expect_same(codes, codes_expected, "codes");
  expect_same(scale, scale_expected, "scale");
  expect_same(offset, offset_expected, "offset");
}

void dense_and_bitmap() {
  const int64_t M = any(0, 3) == 0 ? any(1, 40) : any(1, 8), N = any(1, 50);
  const int64_t groups = any(1, 3), K4 = groups * any(1, 20), panels = ceil_div(N, kPanel);
  what = "int8_gemm of M=" + std::to_string(M) + " N=" + std::to_string(N) +
         " K4=" + std::to_string(K4) + " groups=" + std::to_string(groups);
  const int64_t blocks = panels * K4, y_stride = N + any(0, 2);
  Buffer<uint8_t> weight(blocks * kBlockBytes), kept(blocks * kBlockBytes + 64), mask(blocks * 8);
  Buffer<int64_t> start(panels);
  const int64_t density = any(0, 4);
  int64_t count = 0;
  for (int64_t i = 0; i < blocks; ++i) {
    if (i % K4 == 0) start[i / K4] = count;
    std::memset(mask + 8 * i, 0, 8);
    for (int64_t b = 0; b < kBlockBytes; ++b) {
      const bool present = any(0, 3) < density;
      weight[i * kBlockBytes + b] = present ? static_cast<uint8_t>(any(0, 255)) : 0x80;
      mask[8 * i + b / 8] |= static_cast<uint8_t>(present << b % 8);
      if (present) kept[count++] = weight[i * kBlockBytes + b];
    }
  }
  Buffer<uint8_t> exact(count + 64);
  std::memcpy(exact, kept, static_cast<size_t>(count));
  Buffer<int8_t> x(M * K4 * 4);
  x.fill(code);
  Buffer<float> x_scale(M * groups), weight_scale(N), bias(N), y((M - 1) * y_stride + N),
      expected((M - 1) * y_stride + N);
  Buffer<int32_t> x_offset(M * groups);
  x_scale.fill([] { return any(0, 60) == 0 ? NAN : power(); });
  weight_scale.fill(power);
  bias.fill(code);
  for (int64_t i = 0; i < M * groups; ++i) {
    int32_t sum = 0;
    for (int64_t k = 0; k < 4 * K4 / groups; ++k) sum += x[i * 4 * K4 / groups + k];
    x_offset[i] = -128 * sum;
  }
  Int8Gemm g{weight, x,        4 * K4, x_scale, x_offset, weight_scale, any(0, 1) ? +bias : nullptr,
             y,      y_stride, M,      N,       K4,       groups};
  Int8Gemm reference = g;
  reference.y = expected;
  int8_gemm_portable(reference);
  int8_gemm()(g);
  expect_same(y, expected, "y");

  what = "bitmap of the same " + what;
  Buffer<float> sparse((M - 1) * y_stride + N);
  g.weight = exact;
  g.y = sparse;
  bitmap_gemm()({g, mask, start});
  expect_same(sparse, expected, "y");
  Buffer<uint8_t> expanded(blocks * kBlockBytes);
  bitmap_expand()({exact, mask, blocks, expanded});
  expect_same(expanded, weight, "panels");
}

void weight_only(int bits) {
  const int64_t step = 32 / bits, groups = any(1, 3), per_group = any(1, 2);
  const int64_t segment = step * any(1, 4), group = segment * per_group;
  const int64_t K = groups == 1 && per_group == 1 ? any(1, 100) : groups * group;
  const int64_t width = K == groups * group ? segment : K;  // of a segment
  const int64_t segments = ceil_div(K, width), blocks = ceil_div(K, step), rows = any(1, kTile);
  const int64_t lanes = any(1, 16);
  what = "weight_only of " + std::to_string(bits) + " bits, K=" + std::to_string(K) +
         " groups=" + std::to_string(groups) + " rows=" + std::to_string(rows);
  Buffer<uint8_t> weight(blocks * kBlockBytes);
  weight.fill([] { return generator(); });
  Buffer<float> scale(lanes * groups), scale_panel(groups * kPanel),
      scale_expected(groups * kPanel);
  Buffer<int8_t> zero_point(lanes * groups);
  Buffer<int32_t> zero(groups * kPanel), zero_expected(groups * kPanel);
  scale.fill(power);
  zero_point.fill([&] { return bits == 8 ? code() : any(0, 15); });
  PanelScales p{scale, any(0, 1) ? +zero_point : nullptr, lanes, groups, bits, scale_panel, zero};
  panel_scales()(p);
  p.scale_panel = scale_expected;
  p.zero_panel = zero_expected;
  panel_scales_portable(p);
  expect_same(scale_panel, scale_expected, "scale_panel");
  expect_same(zero, zero_expected, "zero_panel");

  Buffer<int8_t> x(blocks * step * rows);
  for (int64_t i = 0; i < x.size(); ++i) {
    const int64_t k = i / (4 * rows) * 4 + i % 4;
    x[i] = static_cast<int8_t>(k < K ? code() : 0);
  }
  Buffer<float> x_scale(segments * rows), y(rows * kPanel), expected(rows * kPanel);
  Buffer<int32_t> x_sum(segments * rows);
  x_scale.fill([] { return 1.0f; });
  x_sum.fill([] { return 0; });
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t r = 0; r < rows; ++r)
      x_sum[k / width * rows + r] -= x[(k / 4 * rows + r) * 4 + k % 4];
  }
  WeightOnlyInt8Gemm g{weight, bits,    scale_panel, zero, K, width,   segments / groups,
                       x,      x_scale, x_sum,       rows, y, nullptr, nullptr};
  weight_only_int8_gemm()(g);
  g.y = expected;
  weight_only_int8_gemm_portable(g);
  expect_same(y, expected, "y");

  Buffer<float> dense(blocks * step * kPanel), dense_expected(blocks * step * kPanel);
  WeightOnlyPanel d{weight, bits, scale_panel, zero, K, K / groups, 0, K, dense, nullptr, nullptr};
  weight_only_dequantize()(d);
  d.dense = dense_expected;
  weight_only_dequantize_portable(d);
  for (int64_t i = K * kPanel; i < dense.size(); ++i) dense[i] = dense_expected[i];
  expect_same(dense, dense_expected, "dense");

  Buffer<float> used(K * kPanel), inputs(K * rows);
  std::memcpy(used, dense, static_cast<size_t>(K * kPanel) * sizeof(float));
  inputs.fill(code);
  y.fill(code);
  std::memcpy(expected, y, static_cast<size_t>(rows * kPanel) * sizeof(float));
  panel_gemm()({used, inputs, K, rows, y});
  panel_gemm_portable({used, inputs, K, rows, expected});
  expect_same(y, expected, "y of panel_gemm");
}

void codebook(int bits) {
  const int64_t step = 32 / bits, groups = any(1, 3), group = step * any(1, 5);
  const int64_t K = groups == 1 ? any(1, 60) : groups * group, blocks = ceil_div(K, step);
  what = "codebook of " + std::to_string(bits) + " bits, K=" + std::to_string(K) +
         " groups=" + std::to_string(groups);
  Buffer<uint8_t> weight(blocks * kBlockBytes), planes(4 * 256);
  weight.fill([] { return generator(); });
  Buffer<float> table(1 << bits), scale(groups * kPanel), x(round_up(K, 8));
  table.fill(code);
  for (int64_t i = 0; bits == 8 && i < 256; ++i) {
    uint32_t entry;
    std::memcpy(&entry, table + i, 4);
    for (int b = 0; b < 4; ++b) planes[b * 256 + i] = static_cast<uint8_t>(entry >> (8 * b));
  }
  scale.fill(power);
  x.fill([] { return 0; });
  for (int64_t k = 0; k < K; ++k) x[k] = static_cast<float>(code());
  Buffer<float> dense(blocks * step * kPanel), dense_expected(blocks * step * kPanel), y(kPanel),
      expected(kPanel);
  CodebookPanel p{weight, bits,  table, 0, bits == 8 ? +planes : nullptr, scale, K, K / groups, 0,
                  K,      dense, x,     y};
  codebook_dequantize()(p);
  codebook_gemv()(p);
  p.dense = dense_expected;
  p.y = expected;
  codebook_dequantize_portable(p);
  codebook_gemv_portable(p);
  for (int64_t i = K * kPanel; i < dense.size(); ++i) dense[i] = dense_expected[i];
  expect_same(dense, dense_expected, "dense");
  expect_same(y, expected, "y of gemv");
}

// There is no portable split_rows: the digits must give x back within half a unit, a unit of 2^-22
// of the largest input, and two roundings of that input; offsets must be their sums.
void split() {
  if (split_rows() == nullptr) return;
  const int64_t rows = any(1, 3), K = any(1, 90), segment = 8 * any(1, 4);
  const int64_t segments = ceil_div(K, segment), stride = round_up(K, 8);
  what = "split_rows of " + std::to_string(rows) + " x " + std::to_string(K);
  Buffer<float> x(rows * K), scale(rows * 3 * segments);
  Buffer<int8_t> digits(rows * 3 * stride);
  Buffer<int32_t> offset(rows * 3 * segments);
  x.fill(any_float);
  const int kind = static_cast<int>(any(0, 9));
  if (kind == 0) x.fill([] { return 0; });
  if (kind == 1) x[any(0, rows * K - 1)] = any(0, 1) == 0 ? NAN : -INFINITY;
  bool small = false;
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t k = 0; k < K; k += segment) {
      float top = 0;
      for (int64_t j = k; j < std::min(K, k + segment); ++j)
        top = std::max(top, std::abs(x[m * K + j]));
      small |= top > 0 && top < 1e-30f;
    }
  }
  const bool fits = split_rows()({x, K, rows, K, segment, digits, stride, stride, scale, offset});
  bool right = fits == (kind != 1 && !small);
  for (int64_t m = 0; fits && m < rows; ++m) {
    for (int64_t i = 0; i < segments; ++i) {
      int32_t sum[3] = {};
      double top = 0;
      const int64_t end = std::min(K, (i + 1) * segment);
      for (int64_t k = i * segment; k < end; ++k)
        top = std::max(top, std::abs(double{x[m * K + k]}));
      for (int64_t k = i * segment; k < end; ++k) {
        double value = 0;
        for (int d = 0; d < 3; ++d) {
          const int8_t digit = digits[(m * 3 + d) * stride + k];
          sum[d] += digit;
          value += static_cast<double>(digit) * double{scale[(m * 3 + d) * segments + i]};
        }
        right &= std::abs(value - double{x[m * K + k]}) <= top * (0x1p-23 + 0x1p-22);
      }
      for (int d = 0; d < 3; ++d) right &= offset[(m * 3 + d) * segments + i] == -128 * sum[d];
    }
  }
  if (right) return;
  std::printf("%s, %s: digits do not give x back\n", isa.c_str(), what.c_str());
  exit(1);
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 300;
  for (int i = 0; i < kIsaCount; ++i) {
    if (!isa_runs(static_cast<Isa>(i))) continue;
    isa = isa_name(static_cast<Isa>(i));
    set_current_isa(isa.c_str());
    for (int round = 0; round < rounds; ++round) {
      convert_rows<float>(Dtype::f32);
      convert_rows<uint16_t>(Dtype::bf16);
      convert_rows<uint16_t>(Dtype::f16);
      quantize<float>(Dtype::f32);
      quantize<uint16_t>(Dtype::bf16);
      quantize<uint16_t>(Dtype::f16);
      dense_and_bitmap();
      for (const int bits : {4, 8}) weight_only(bits);
      for (const int bits : {4, 8}) codebook(bits);
      split();
    }
    std::printf("%s\n", isa.c_str());
  }
}
