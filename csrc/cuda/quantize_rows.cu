// quantize_activation: x [groups, group_size] row-major to int8 codes and a scale a token or group.
//
//     scale = max|x| / 127,   code = round_half_even(x · (127 / max|x|))
//
// Codes are 0 and the scale is NaN where max|x| is infinite or NaN. A block of 128 threads takes a
// token or group: reading x twice bounds it, from L2 the second time; once where the scale is
// given. Not yet measured.
#include "floats.cuh"
#include "kernels.h"

namespace llmq::cuda {
namespace {

constexpr int kThreads = 128;
// The bits of |x| order finite values, infinity, NaN.
constexpr uint32_t kInfinity = 0x7f800000u;

// Of the bits of |x|: integers order infinity below NaN, which a float maximum would lose.
LLMQ_PTX uint32_t block_max(uint32_t value, uint32_t* shared) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const uint32_t other = ptx::shfl_xor(value, distance);
    value = value < other ? other : value;
  }
  if (threadIdx.x % 32 == 0) ptx::st_shared(shared + threadIdx.x / 32, value);
  ptx::barrier();
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) {
    const uint32_t other = ptx::ld_shared(shared + warp);
    value = value < other ? other : value;
  }
  return value;
}

// code = round_half_even(clamp(x · (1 / scale), ±127)) with the scale that is given; 0, and NaN for
// the scale, where that is not in (1e-30, infinity) or an input of the row is infinite or NaN.
__global__ void __launch_bounds__(kThreads) quantize_given(const QuantizeRows q) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t x = static_cast<int64_t>(blockIdx.x) * q.group_size;
  const float given = ptx::ld_global(q.given);
  const bool usable = given > 1e-30f && ptx::bits_of(given) < kInfinity;
  const float inverse = usable ? ptx::div(1, given) : 0;

  uint32_t bits = 0;
  for (int i = thread; i < q.group_size; i += kThreads) {
    const float value = load_float(q.x, q.x_dtype, x + i);
    const uint32_t magnitude = ptx::bits_of(value) & 0x7fffffffu;
    bits = bits < magnitude ? magnitude : bits;
    float step = magnitude < kInfinity ? ptx::mul(value, inverse) : 0;
    step = step > 127 ? 127 : step < -127 ? -127 : step;
    ptx::st_global(q.codes + x + i, static_cast<int8_t>(ptx::cvt_rni(step)));
  }
  bits = block_max(bits, reinterpret_cast<uint32_t*>(ptx::shared_memory()));
  for (int i = thread; bits >= kInfinity && i < q.group_size; i += kThreads) {
    ptx::st_global(q.codes + x + i, static_cast<int8_t>(0));
  }
  if (thread == 0) {
    const bool valid = usable && bits < kInfinity;
    ptx::st_global(q.scale + blockIdx.x, valid ? given : ptx::float_of(0x7fc00000u));
  }
}

__global__ void __launch_bounds__(kThreads) quantize(const QuantizeRows q) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t x = static_cast<int64_t>(blockIdx.x) * q.group_size;

  uint32_t bits = 0;
  for (int i = thread; i < q.group_size; i += kThreads) {
    const uint32_t magnitude = ptx::bits_of(load_float(q.x, q.x_dtype, x + i)) & 0x7fffffffu;
    bits = bits < magnitude ? magnitude : bits;
  }
  const float amax =
      ptx::float_of(block_max(bits, reinterpret_cast<uint32_t*>(ptx::shared_memory())));
  const bool finite = ptx::bits_of(amax) < kInfinity;
  const float inverse = finite && amax > 1e-30f ? ptx::div(127, amax) : 0;
  for (int i = thread; i < q.group_size; i += kThreads) {
    const float value = load_float(q.x, q.x_dtype, x + i);
    const int code = finite ? ptx::cvt_rni(ptx::mul(value, inverse)) : 0;
    ptx::st_global(q.codes + x + i, static_cast<int8_t>(code));
  }
  if (thread == 0) {
    const float scale = finite ? ptx::div(amax, 127) : ptx::float_of(0x7fc00000u);
    ptx::st_global(q.scale + blockIdx.x, scale);
  }
}

}  // namespace

void quantize_rows(const QuantizeRows& q, void* stream) {
  const Launch grid{static_cast<unsigned>(q.groups),  1,     1, kThreads,
                    kThreads / 32 * sizeof(uint32_t), stream};
  q.given == nullptr ? launch(quantize, grid, q) : launch(quantize_given, grid, q);
}

}  // namespace llmq::cuda
