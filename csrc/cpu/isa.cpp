#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace llmq {
namespace {

#if defined(__aarch64__)
constexpr const char* kNames[kIsaCount] = {"portable", "neondot", "i8mm"};
#else
constexpr const char* kNames[kIsaCount] = {"portable", "avx2", "avxvnni", "avx512vnni"};
#endif

#if defined(__x86_64__)
// GCC 11, which is still in use, has no name for it in __builtin_cpu_supports. It needs no state of
// its own beside AVX2's.
bool has_avxvnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & 1u << 4) != 0;
}
#endif

Isa fastest() {
  for (int i = kIsaCount - 1; i > 0; --i) {
    if (isa_runs(static_cast<Isa>(i))) return static_cast<Isa>(i);
  }
  return Isa::portable;
}

Isa parse(const std::string& name) {
  std::string runs;
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!isa_runs(isa)) continue;
    if (name == kNames[i]) return isa;
    runs += std::string(runs.empty() ? "" : ", ") + kNames[i];
  }
  throw std::invalid_argument("llmq: instruction set '" + name + "' does not run here; " + runs +
                              (runs.find(',') == std::string::npos ? " does" : " do"));
}

// An LLMQ_ISA that does not run here is reported by the first op: throwing while the library is
// loading would end the process.
std::string& deferred_error() {
  static std::string error;
  return error;
}

Isa at_load() {
  const char* forced = std::getenv("LLMQ_ISA");
  if (forced == nullptr || *forced == '\0') return fastest();
  try {
    return parse(forced);
  } catch (const std::invalid_argument& error) {
    deferred_error() = std::string(error.what()) + " (LLMQ_ISA)";
    return Isa::portable;
  }
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{at_load()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_runs(Isa isa) {
  if (isa == Isa::portable) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == Isa::avx2 || isa == Isa::avxvnni) {
    // Every CPU with AVX2 has F16C too.
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           (isa == Isa::avx2 || has_avxvnni());
  }
  // VBMI2 expands bitmaps; it is why Cascade Lake, which has VNNI alone, runs avx2.
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vbmi2");
#elif defined(__aarch64__) && defined(__linux__)
  // From the kernel's arch/arm64 ABI; headers older than a bit do not name it.
  constexpr unsigned long kDotProduct = 1ul << 20, kInt8Matrix = 1ul << 13;
  if ((getauxval(AT_HWCAP) & kDotProduct) == 0) return false;
  return isa == Isa::neondot || (getauxval(AT_HWCAP2) & kInt8Matrix) != 0;
#elif defined(__aarch64__) && defined(__APPLE__)
  return isa == Isa::neondot;  // every Apple silicon has dot products; M1 has no i8mm
#else
  return false;
#endif
}

Isa current_isa() {
  const Isa isa = current().load(std::memory_order_relaxed);
  if (!deferred_error().empty()) throw std::invalid_argument(deferred_error());
  return isa;
}

void set_current_isa(const char* name) {
  const Isa isa = parse(name);
  current().store(isa, std::memory_order_relaxed);
  deferred_error().clear();
}

}  // namespace llmq
