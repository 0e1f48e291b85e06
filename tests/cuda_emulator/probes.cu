// Small kernels that do one thing wrong, or badly; run_probe returns what the emulator says of it.
#include <string>

#include "../../csrc/cuda/ptx.cuh"

using namespace llmq;

namespace {

enum class Probe : int { fine, divergent, lonely_barrier, unwritten, warp_race, odd_address };

__global__ void probe(Probe what, const int* in, int* out) {
  auto* const shared = reinterpret_cast<int*>(ptx::shared_memory());
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  ptx::st_shared(shared + thread, ptx::ld_global(in + thread));
  if (what == Probe::divergent && lane < 16) {
    ptx::sync_warp();
  } else if (what != Probe::warp_race) {
    ptx::sync_warp();
  }
  if (what == Probe::lonely_barrier && thread >= 32) return;
  const int neighbour = thread & ~1;
  const int got = what == Probe::unwritten ? ptx::ld_shared(shared + 64 + thread)
                                           : ptx::ld_shared(shared + neighbour);
  ptx::barrier();
  if (what == Probe::odd_address) ptx::ld_global(reinterpret_cast<const Words4*>(in + 1));
  ptx::st_global(out + thread, got);
}

// Every lane a line of memory apart, and a bank.
__global__ void strided(int stride, const int* in, int* out) {
  auto* const shared = reinterpret_cast<int*>(ptx::shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  ptx::st_shared(shared + thread * stride, ptx::ld_global(in + thread * stride));
  ptx::barrier();
  ptx::st_global(out + thread, ptx::ld_shared(shared + thread * stride));
}

template <class Run>
const char* guarded(const Run& run) {
  static std::string message;
  try {
    run();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {
const char* run_probe(int what, const int* in, int* out) {
  return guarded(
      [&] { launch(probe, {1, 1, 1, 64, 1024, nullptr}, static_cast<Probe>(what), in, out); });
}
const char* run_strided(int stride, const int* in, int* out) {
  return guarded([&] { launch(strided, {1, 1, 1, 32, 8192, nullptr}, stride, in, out); });
}
}
#pragma GCC visibility pop
