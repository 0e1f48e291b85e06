// What this machine can do at most, as JSON: read bandwidth by working set, and peak rates of the
// arithmetic that kernels use. `ceilings THREADS`; built by ceilings.py with -march=native.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

volatile uint64_t sink;

// Runs body(thread) on all threads at once; returns the seconds of the slowest.
template <class Body>
double together(int threads, const Body& body) {
  std::vector<std::thread> others;
  const auto start = Clock::now();
  for (int t = 1; t < threads; ++t) others.emplace_back([&, t] { body(t); });
  body(0);
  for (auto& other : others) other.join();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

uint64_t read(const uint8_t* data, int64_t bytes) {
#if defined(__AVX512F__)
  __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
  for (int64_t i = 0; i < bytes; i += 256) {
    a = _mm512_or_si512(a, _mm512_loadu_si512(data + i));
    b = _mm512_or_si512(b, _mm512_loadu_si512(data + i + 64));
    c = _mm512_or_si512(c, _mm512_loadu_si512(data + i + 128));
    d = _mm512_or_si512(d, _mm512_loadu_si512(data + i + 192));
  }
  a = _mm512_or_si512(_mm512_or_si512(a, b), _mm512_or_si512(c, d));
  return static_cast<uint64_t>(_mm512_reduce_or_epi64(a));
#else
  uint64_t sum[8] = {};
  for (int64_t i = 0; i < bytes; i += 64) {
    uint64_t words[8];
    __builtin_memcpy(words, data + i, 64);
    for (int j = 0; j < 8; ++j) sum[j] |= words[j];
  }
  return sum[0] | sum[1] | sum[2] | sum[3] | sum[4] | sum[5] | sum[6] | sum[7];
#endif
}

// GB/s over `bytes` a thread, best of several passes.
double bandwidth(int threads, int64_t bytes) {
  std::vector<std::vector<uint8_t>> data(static_cast<size_t>(threads));
  for (auto& part : data) part.assign(static_cast<size_t>(bytes), 1);
  const int64_t repeats = std::max<int64_t>(1, (int64_t{1} << 28) / bytes);
  double best = 1e9;
  for (int pass = 0; pass < 7; ++pass) {
    best = std::min(best, together(threads, [&](int t) {
      for (int64_t r = 0; r < repeats; ++r) {
        sink = read(data[static_cast<size_t>(t)].data(), bytes);
      }
    }));
  }
  return static_cast<double>(threads) * static_cast<double>(bytes * repeats) / best / 1e9;
}

constexpr int64_t kSteps = 20'000'000;

// 1e9 operations a second (a multiplication and an addition are two) of int8 dot products.
int64_t int8_steps() {
#if defined(__AVX512VNNI__)
  __m512i sums[12], a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
#pragma GCC unroll 12
  for (auto& sum : sums) sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < kSteps / 12; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < 12; ++c) asm("vpdpbusd %2, %1, %0" : "+v"(sums[c]) : "v"(a), "v"(b));
  }
#pragma GCC unroll 12
  for (const auto& sum : sums) sink = static_cast<uint64_t>(_mm512_reduce_add_epi32(sum));
  return kSteps / 12 * 12 * 128;
#elif defined(__AVX2__)
  __m256i sums[6], a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(2), ones = _mm256_set1_epi16(1);
#pragma GCC unroll 12
  for (auto& sum : sums) sum = _mm256_setzero_si256();
  for (int64_t i = 0; i < kSteps / 6; ++i) {
#pragma GCC unroll 6
    for (int c = 0; c < 6; ++c) {
      __m256i pairs;
      asm volatile("vpmaddubsw %2, %1, %0" : "=x"(pairs) : "x"(a), "x"(b));
      sums[c] = _mm256_add_epi32(sums[c], _mm256_madd_epi16(pairs, ones));
    }
  }
#pragma GCC unroll 12
  for (const auto& sum : sums) sink = static_cast<uint64_t>(_mm256_extract_epi32(sum, 0));
  return kSteps / 6 * 6 * 64;
#else
  return 0;
#endif
}

// The same of float32 fused multiply-adds.
int64_t float_steps() {
#if defined(__AVX512F__)
  __m512 sums[12], a = _mm512_set1_ps(1e-9f), b = _mm512_set1_ps(1.0f);
#pragma GCC unroll 12
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < kSteps / 12; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < 12; ++c) asm("vfmadd231ps %2, %1, %0" : "+v"(sums[c]) : "v"(a), "v"(b));
  }
#pragma GCC unroll 12
  for (const auto& sum : sums) sink = static_cast<uint64_t>(_mm512_reduce_add_ps(sum));
  return kSteps / 12 * 12 * 32;
#elif defined(__AVX2__)
  __m256 sums[12], a = _mm256_set1_ps(1e-9f), b = _mm256_set1_ps(1.0f);
#pragma GCC unroll 12
  for (auto& sum : sums) sum = _mm256_setzero_ps();
  for (int64_t i = 0; i < kSteps / 12; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < 12; ++c) asm("vfmadd231ps %2, %1, %0" : "+x"(sums[c]) : "x"(a), "x"(b));
  }
#pragma GCC unroll 12
  for (const auto& sum : sums) sink = static_cast<uint64_t>(_mm256_cvtss_f32(sum));
  return kSteps / 12 * 12 * 16;
#else
  return 0;
#endif
}

double rate(int threads, int64_t (*steps)()) {
  double best = 1e9;
  int64_t operations = 0;
  for (int pass = 0; pass < 7; ++pass) {
    best = std::min(best, together(threads, [&](int t) {
      const int64_t done = steps();
      if (t == 0) operations = done;
    }));
  }
  return static_cast<double>(threads) * static_cast<double>(operations) / best / 1e9;
}

}  // namespace

int main(int count, char** arguments) {
  const int threads = count > 1 ? std::max(1, std::atoi(arguments[1])) : 1;
  std::printf("{\"read_256k_gbs\": %.1f, \"read_8m_gbs\": %.1f, \"read_memory_gbs\": %.1f, ",
              bandwidth(threads, 256 << 10), bandwidth(threads, 8 << 20),
              bandwidth(threads, 256 << 20));
  std::printf("\"int8_gops\": %.1f, \"float32_gops\": %.1f}\n", rate(threads, int8_steps),
              rate(threads, float_steps));
}
