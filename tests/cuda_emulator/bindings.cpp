// What Python calls: each launcher on the emulated machine, with errors as text.
#include <cstdio>

#include "../../csrc/cuda/kernels.h"
#include "cuda_emulator.h"

// Weak: a library may hold some of the kernels only.
namespace llmq::cuda {
[[gnu::weak]] void weight_only_gemm(const SmallGemm& g, int bits, bool codes, void* stream);
[[gnu::weak]] void int8_gemm(const SmallGemm& g, void* stream);
[[gnu::weak]] void bitmap_gemm(const SmallGemm& g, int value_bytes, bool codes, void* stream);
[[gnu::weak]] void bitmap_expand(const SmallGemm& g, int value_bytes, void* stream);
[[gnu::weak]] void semi_structured_gemm(const SparseGemm& g, void* stream);
[[gnu::weak]] void quantize_rows(const QuantizeRows& q, void* stream);
}  // namespace llmq::cuda

using namespace llmq::cuda;

namespace {

template <class Launch>
const char* guarded(const Launch& launch) {
  static std::string message;
  try {
    launch();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Kernels may touch registered memory only.
void emulator_register(const void* data, size_t bytes, const char* name) {
  emulator::machine().memory.push_back({static_cast<const char*>(data), bytes, name});
}
void emulator_reset(unsigned seed) {
  emulator::machine().memory.clear();
  emulator::machine().counters = {};
  emulator::machine().seed = seed;
}
void emulator_counters(emulator::Counters* counters) { *counters = emulator::machine().counters; }

size_t small_gemm_size() { return sizeof(SmallGemm); }
size_t sparse_gemm_size() { return sizeof(SparseGemm); }
size_t quantize_rows_size() { return sizeof(QuantizeRows); }

int sparse_plans() { return static_cast<int>(std::size(kSparsePlans)); }
int sparse_plan_bytes(int plan) { return kSparsePlans[plan].bytes(); }
int choose_plan(int64_t M, int64_t N, int multiprocessors, int shared_bytes, bool wgmma) {
  return choose_sparse_plan(M, N, multiprocessors, shared_bytes, wgmma);
}

const char* run_weight_only(const SmallGemm* g, int bits) {
  return guarded([&] { weight_only_gemm(*g, bits, false, nullptr); });
}
const char* run_int4_of_codes(const SmallGemm* g) {
  return guarded([&] { weight_only_gemm(*g, 4, true, nullptr); });
}
const char* run_int8(const SmallGemm* g) {
  return guarded([&] { int8_gemm(*g, nullptr); });
}
const char* run_bitmap(const SmallGemm* g, int value_bytes, bool codes) {
  return guarded([&] { bitmap_gemm(*g, value_bytes, codes, nullptr); });
}
const char* run_bitmap_expand(const SmallGemm* g, int value_bytes) {
  return guarded([&] { bitmap_expand(*g, value_bytes, nullptr); });
}
const char* run_semi_structured(const SparseGemm* g) {
  return guarded([&] { semi_structured_gemm(*g, nullptr); });
}
const char* run_quantize(const QuantizeRows* q) {
  return guarded([&] { quantize_rows(*q, nullptr); });
}

}  // extern "C"
#pragma GCC visibility pop
