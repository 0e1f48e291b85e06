// The instruction sets that kernels are built for, and the one in use.
#pragma once

namespace llmq {

// Ordered from slowest to fastest; also the columns of the table in dispatch.cpp.
#if defined(__aarch64__)
enum class Isa : int { portable = 0, neondot = 1, i8mm = 2 };
inline constexpr int kIsaCount = 3;
#else
enum class Isa : int { portable = 0, avx2 = 1, avxvnni = 2, avx512vnni = 3 };
inline constexpr int kIsaCount = 4;
#endif

const char* isa_name(Isa isa);

// Whether this CPU and operating system run `isa` and this build has it.
bool isa_runs(Isa isa);

// The ISA in use: the fastest that runs, or the one that LLMQ_ISA named when the library was
// loaded.
Isa current_isa();

// Forces the ISA called `name`; throws std::invalid_argument if it is unknown or does not run here.
void set_current_isa(const char* name);

}  // namespace llmq
