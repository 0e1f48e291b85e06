// One thin wrapper an instruction, under the instruction's own name; kernels hold no inline PTX and
// touch memory only through these. Built with LLMQ_CUDA_EMULATOR the same names run on the CPU,
// where every access is checked (tests/cuda_emulator).
//
// Fragments of mma, of lane 4·g + t (g = 0 … 7, t = 0 … 3), elements low to high in a register:
//   m16n8k16 f16   a0 row g,   columns 2t, 2t+1       a2 the same, columns + 8
//                  a1 row g+8, columns 2t, 2t+1       a3 the same, columns + 8
//                  b0 rows 2t, 2t+1 of column g       b1 the same, rows + 8
//   m16n8k32 s8    the same with columns 4t … 4t+3, and + 16
//   m16n8k64 s8    2:4 sparse: a is that of m16n8k32, of the values kept
//                  b0 rows 4t … 4t+3 of column g          b1, b2, b3 rows + 16, + 32, + 48
//                  metadata of every lane (selector 0): row g + 8·(t % 2), columns 32·(t / 2) and
//                  31 more, from the low nibble on one for 4 columns: first place | second << 2
//   c, d           c0, c1 row g, columns 2t, 2t+1     c2, c3 row g+8
// wgmma m64n192k64 s8, of 4 warps: metadata and d of warp w are those of m16n8k64 for the 16 rows
// from 16·w on, of which d has 24, one for 8 columns.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llmq {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct alignas(8) Words2 {
  uint32_t word[2];
};
struct alignas(16) Words4 {
  uint32_t word[4];
};
struct alignas(8) FloatWord {
  float value;
  uint32_t word;
};

struct Launch {
  unsigned x, y, z;  // blocks
  unsigned threads;  // a block, at most 1024
  size_t shared_bytes;
  void* stream;
};

}  // namespace llmq

#ifdef LLMQ_CUDA_EMULATOR
#include "emulated_ptx.h"
#else

#include <cuda_runtime.h>

#include <stdexcept>

#define LLMQ_PTX __device__ __forceinline__

namespace llmq {

// Runs kernel(arguments …) on the stream; throws if the launch is refused.
template <class... Parameters>
void launch(void (*kernel)(Parameters...), const Launch& l, Parameters... arguments) {
  if (l.shared_bytes > 48 * 1024) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(l.shared_bytes));
  }
  const dim3 grid(l.x, l.y, l.z);
  const auto stream = static_cast<cudaStream_t>(l.stream);
  // clang-format off
  kernel<<<grid, l.threads, l.shared_bytes, stream>>>(arguments...);
  // clang-format on
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// What the kernel's launch bounds are in the code that the current device runs.
template <class... Parameters>
int max_threads(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  return attributes.maxThreadsPerBlock;
}

namespace ptx {

// Memory

LLMQ_PTX unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char bytes[];
  return bytes;
}

LLMQ_PTX uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

template <class T>
LLMQ_PTX T ld_global(const T* p) {  // of what no block of the launch writes
  return *p;
}
template <class T>
LLMQ_PTX T ld_global_cg(const T* p) {  // past L1: of what another block has written
  return __ldcg(p);
}
template <class T>
LLMQ_PTX void st_global(T* p, T value) {
  *p = value;
}
template <class T>
LLMQ_PTX T ld_shared(const T* p) {
  return *p;
}
template <class T>
LLMQ_PTX void st_shared(T* p, T value) {
  *p = value;
}

// Copies `bytes` (0 … 16) and fills up to 16 with zeros.
LLMQ_PTX void cp_async_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}
LLMQ_PTX uint64_t evict_first() {  // of L2, so that inputs stay
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// Likewise of what is read once.
LLMQ_PTX void cp_async_16_once(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "l"(evict_first())
               : "memory");
}
// 16 bytes or, unless `wanted`, none: by a predicate, where a branch would be one.
LLMQ_PTX void cp_async_16_once_if(bool wanted, void* shared, const void* global) {
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.b32 wanted, %0, 0;\n"
      "@wanted cp.async.cg.shared.global.L2::cache_hint [%1], [%2], 16, %3;\n"
      "}" ::"r"(static_cast<int>(wanted)),
      "r"(shared_address(shared)), "l"(global), "l"(evict_first())
      : "memory");
}
LLMQ_PTX void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
LLMQ_PTX void cp_async_wait() {  // until at most kPending groups of this thread are under way
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8×8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
LLMQ_PTX void ldmatrix_x4(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}

// Threads

LLMQ_PTX void barrier() { __syncthreads(); }
LLMQ_PTX void sync_warp() { __syncwarp(); }
LLMQ_PTX void fence() { __threadfence(); }
LLMQ_PTX uint32_t shfl_xor(uint32_t value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
// Returns the old value; after `limit` comes 0.
LLMQ_PTX uint32_t atom_inc(uint32_t* p, uint32_t limit) { return atomicInc(p, limit); }

// Tensor cores: d += a·b

LLMQ_PTX void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
LLMQ_PTX void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
LLMQ_PTX void mma(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int8_t) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
LLMQ_PTX void mma(int32_t (&d)[4], const uint32_t (&a)[2], uint32_t b, int8_t) {  // 16 columns
  asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}
// Of a 2:4 sparse a; places in a nibble ascend.
LLMQ_PTX void mma_sp(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                     uint32_t metadata) {
  asm("mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
        "r"(metadata));
}

// Products of a warpgroup of 4 warps that read shared memory on their own, of sm_90a alone.

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
inline constexpr bool kHasWgmma = true;
#else
inline constexpr bool kHasWgmma = false;
#endif

// What this thread has written in shared memory will be seen by wgmma, once a barrier says so.
LLMQ_PTX void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
LLMQ_PTX void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
LLMQ_PTX void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
LLMQ_PTX void wgmma_wait() {  // until at most kPending groups of this warp are under way
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
#define LLMQ_4(d, i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define LLMQ_16(d, i) LLMQ_4(d, i), LLMQ_4(d, i + 4), LLMQ_4(d, i + 8), LLMQ_4(d, i + 12)
// d, a, b and metadata belong to it until it was waited for; a fence before the first of a group.
LLMQ_PTX void wgmma_sp(int32_t (&d)[96], uint64_t a, uint64_t b, uint32_t metadata) {
  asm volatile(
      "wgmma.mma_async.sp.sync.aligned.m64n192k64.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
      "%96, %97, %98, 0, 1;"
      : LLMQ_16(d, 0), LLMQ_16(d, 16), LLMQ_16(d, 32), LLMQ_16(d, 48), LLMQ_16(d, 64),
        LLMQ_16(d, 80)
      : "l"(a), "l"(b), "r"(metadata));
}
#undef LLMQ_4
#undef LLMQ_16

// Bits and numbers

// a, of which the compiler knows nothing: what follows from it is found here and kept in no
// register from before a loop.
LLMQ_PTX int opaque(int a) {
  asm volatile("" : "+r"(a));
  return a;
}
template <int kTable>
LLMQ_PTX uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {  // any function of three bits
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return d;
}
inline constexpr int kAndOr = (0xf0 & 0xcc) | 0xaa;  // table of (a & b) | c

LLMQ_PTX uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {  // bytes of {b, a}, by nibble
  uint32_t d;  // __byte_perm would mask the selector
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}
LLMQ_PTX uint32_t shf_r(uint32_t low, uint32_t high, uint32_t bits) {  // bits modulo 32
  return __funnelshift_r(low, high, bits);
}
LLMQ_PTX uint32_t popc(uint32_t a) { return static_cast<uint32_t>(__popc(a)); }

LLMQ_PTX uint32_t fma2(uint32_t a, uint32_t b, uint32_t c, Half) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
LLMQ_PTX uint32_t fma2(uint32_t a, uint32_t b, uint32_t c, BFloat16) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
LLMQ_PTX float cvt(Half a) {
  float d;
  asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(a.bits));
  return d;
}
LLMQ_PTX float cvt(BFloat16 a) { return __uint_as_float(static_cast<uint32_t>(a.bits) << 16); }
LLMQ_PTX float cvt(float a) { return a; }
LLMQ_PTX void cvt(float a, Half& d) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(d.bits) : "f"(a)); }
LLMQ_PTX void cvt(float a, BFloat16& d) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(d.bits) : "f"(a)); }
LLMQ_PTX void cvt(float a, float& d) { d = a; }
LLMQ_PTX int cvt_rni(float a) { return __float2int_rn(a); }  // ties to even
LLMQ_PTX uint32_t bits_of(float a) { return __float_as_uint(a); }
LLMQ_PTX float float_of(uint32_t a) { return __uint_as_float(a); }
// Rounded on their own: the compiler contracts * and + into an FMA.
LLMQ_PTX float mul(float a, float b) { return __fmul_rn(a, b); }
LLMQ_PTX float add(float a, float b) { return __fadd_rn(a, b); }
LLMQ_PTX float div(float a, float b) { return __fdiv_rn(a, b); }

}  // namespace ptx
}  // namespace llmq
#endif

namespace llmq::ptx {

LLMQ_PTX int min(int a, int b) { return a < b ? a : b; }

// What a matrix of wgmma is in shared memory: rows of 128 (64) bytes, from a multiple of 1024 (512)
// on, whose unit of 16 bytes stands at unit ^ row % 8 (unit ^ row / 2 % 4); `start` may be within a
// row.
template <int kRowBytes>
LLMQ_PTX uint64_t wgmma_matrix(const void* start) {
  static_assert(kRowBytes == 128 || kRowBytes == 64);
  constexpr uint64_t kSwizzle = kRowBytes == 128 ? 1 : 2, kEightRows = 8 * kRowBytes / 16;
  return kSwizzle << 62 | kEightRows << 32 | 1u << 16 | (shared_address(start) & 0x3ffff) >> 4;
}

}  // namespace llmq::ptx
