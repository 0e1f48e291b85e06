// quantize_activation: scale = max|x| / 127, code = round_half_even(x · (127 / max|x|)); codes 0 and
// scale NaN where max|x| is infinite or NaN. A block a token or group: reading x twice bounds it, from
// L2 the second time; not yet measured.
#include "floats.cuh"
#include "kernels.h"

namespace llmq::cuda {
namespace {

constexpr int kThreads = 128;

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
  const bool finite = ptx::bits_of(amax) < 0x7f800000u;
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
  launch(quantize, grid, q);
}

}  // namespace llmq::cuda
