// Elements of any float type as float32, and back.
#pragma once

#include "kernels.h"
#include "ptx.cuh"

namespace llmq::cuda {

LLMQ_PTX float load_float(const void* p, Dtype dtype, int64_t i) {
  if (dtype == Dtype::f32) return ptx::ld_global(static_cast<const float*>(p) + i);
  if (dtype == Dtype::bf16) return ptx::cvt(ptx::ld_global(static_cast<const BFloat16*>(p) + i));
  return ptx::cvt(ptx::ld_global(static_cast<const Half*>(p) + i));
}

template <class T>
LLMQ_PTX void store_as(void* p, int64_t i, float value) {
  T rounded;
  ptx::cvt(value, rounded);
  ptx::st_global(static_cast<T*>(p) + i, rounded);
}
LLMQ_PTX void store_float(void* p, Dtype dtype, int64_t i, float value) {
  if (dtype == Dtype::f32) return store_as<float>(p, i, value);
  if (dtype == Dtype::bf16) return store_as<BFloat16>(p, i, value);
  store_as<Half>(p, i, value);
}

}  // namespace llmq::cuda
