// The instructions of csrc/cuda/ptx.cuh on the emulated machine; matrix fragments as PTX documents.
#pragma once

#include <bit>
#include <cmath>

#include "cuda_emulator.h"

#define LLMQ_PTX inline

namespace llmq {

template <class... Parameters>
void launch(void (*kernel)(Parameters...), const Launch& l, Parameters... arguments) {
  emulator::run_grid({l.x, l.y, l.z}, l.threads, l.shared_bytes, [&] { kernel(arguments...); });
}

template <class... Parameters>
int max_threads(void (*)(Parameters...)) {
  return 1024;
}

namespace ptx {

using emulator::block;
using emulator::kWarp;
using emulator::Site;

// Memory

inline unsigned char* shared_memory() { return reinterpret_cast<unsigned char*>(block().shared()); }

template <class T>
T ld_global(const T* p, Site site = Site::current()) {
  block().check_global(p, sizeof(T), alignof(T), site);
  return *p;
}
template <class T>
T ld_global_cg(const T* p, Site site = Site::current()) {
  return ld_global(p, site);
}
template <class T>
void st_global(T* p, T value, Site site = Site::current()) {
  block().check_global(p, sizeof(T), alignof(T), site);
  *p = value;
}
template <class T>
T ld_shared(const T* p, Site site = Site::current()) {
  block().read_shared(p, sizeof(T), alignof(T), site);
  return *p;
}
template <class T>
void st_shared(T* p, T value, Site site = Site::current()) {
  block().write_shared(p, sizeof(T), alignof(T), site);
  *p = value;
}
inline void cp_async_16(void* shared, const void* global, int bytes, Site site = Site::current()) {
  block().copy_async(shared, global, 16, static_cast<size_t>(bytes), site);
}
inline void cp_async_16_once(void* shared, const void* global, int bytes,
                             Site site = Site::current()) {
  block().copy_async(shared, global, 16, static_cast<size_t>(bytes), site);
}
inline void cp_async_16_once_if(bool wanted, void* shared, const void* global,
                                Site site = Site::current()) {
  if (wanted) block().copy_async(shared, global, 16, 16, site);
}
inline void cp_async_commit() { block().commit(); }
template <int kPending>
void cp_async_wait() {
  block().wait_groups(kPending);
}

inline void ldmatrix_x4(uint32_t (&d)[4], const void* row, Site site = Site::current()) {
  struct Arguments {
    uint32_t* d;
    const char* row;
  } mine{d, static_cast<const char*>(row)};
  block().read_shared(row, 16, 16, site);
  block().together("ldmatrix", site, mine, [](Arguments* const* lanes) {
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        std::memcpy(&lanes[lane]->d[matrix], lanes[matrix * 8 + lane / 4]->row + lane % 4 * 4, 4);
      }
    }
  });
}

// Threads

inline void barrier(Site site = Site::current()) { block().barrier(site); }
inline void sync_warp(Site site = Site::current()) {
  int none = 0;
  block().together("sync_warp", site, none, [](int* const*) {});
}
inline void fence() {}

template <class From>
uint32_t shuffle(const char* name, uint32_t value, const From& from, Site site) {
  struct Arguments {
    uint32_t given, got;
  } mine{value, 0};
  block().together(name, site, mine, [&](Arguments* const* lanes) {
    for (int lane = 0; lane < kWarp; ++lane) lanes[lane]->got = lanes[from(lane)]->given;
  });
  return mine.got;
}
inline uint32_t shfl_xor(uint32_t value, int mask, Site site = Site::current()) {
  return shuffle("shfl_xor", value, [&](int lane) { return lane ^ mask; }, site);
}
inline uint32_t atom_inc(uint32_t* p, uint32_t limit, Site site = Site::current()) {
  const uint32_t old = ld_global(p, site);
  *p = old >= limit ? 0 : old + 1;
  return old;
}

// Numbers

inline float cvt(float a) { return a; }
inline float cvt(BFloat16 a) { return std::bit_cast<float>(static_cast<uint32_t>(a.bits) << 16); }
inline float cvt(Half a) {
  const int exponent = a.bits >> 10 & 31, mantissa = a.bits & 1023;
  const float magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                          : std::ldexp(1024.0f + mantissa, exponent - 25);
  return a.bits & 0x8000 ? -magnitude : magnitude;
}
inline void cvt(float a, float& d) { d = a; }
inline void cvt(float a, BFloat16& d) {
  const uint32_t bits = std::bit_cast<uint32_t>(a);
  d.bits = std::isnan(a) ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void cvt(float a, Half& d) {
  const uint16_t sign = std::signbit(a) ? 0x8000 : 0;
  const float magnitude = std::fabs(a);
  if (std::isnan(a)) {
    d.bits = 0x7fff;
  } else if (magnitude >= 65520) {
    d.bits = sign | 0x7c00;
  } else if (magnitude < 0x1p-14f) {
    d.bits = sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 24)));
  } else {
    const int exponent = std::ilogb(magnitude);
    // A mantissa that rounds up to 2048 carries into the exponent, as it should.
    const int mantissa = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
    d.bits = static_cast<uint16_t>(sign | ((exponent + 14) * 1024 + mantissa));
  }
}
inline int cvt_rni(float a) { return static_cast<int>(std::nearbyint(a)); }
inline uint32_t bits_of(float a) { return std::bit_cast<uint32_t>(a); }
inline float float_of(uint32_t a) { return std::bit_cast<float>(a); }
inline float mul(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float div(float a, float b) { return a / b; }

template <class T>
float element(uint32_t word, int i, T) {
  return cvt(T{static_cast<uint16_t>(word >> (16 * i))});
}
template <class T>
uint32_t fma2(uint32_t a, uint32_t b, uint32_t c, T type) {
  uint32_t d = 0;
  for (int i = 0; i < 2; ++i) {
    // A double holds the exact product and, for numbers as close as these, the exact sum.
    const double exact = static_cast<double>(element(a, i, type)) * element(b, i, type) +
                         static_cast<double>(element(c, i, type));
    T rounded;
    cvt(static_cast<float>(exact), rounded);
    d |= static_cast<uint32_t>(rounded.bits) << (16 * i);
  }
  return d;
}

inline int opaque(int a) { return a; }

template <int kTable>
uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int i = 0; i < 8; ++i) {
    if (kTable >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return d;
}
inline constexpr int kAndOr = (0xf0 & 0xcc) | 0xaa;

inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t which = selector >> (4 * i) & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (which & 7)) & 0xff);
    if (which & 8) byte = byte & 0x80 ? 0xff : 0;
    d |= byte << (8 * i);
  }
  return d;
}
inline uint32_t shf_r(uint32_t low, uint32_t high, uint32_t bits) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (bits & 31));
}
inline uint32_t popc(uint32_t a) { return static_cast<uint32_t>(std::popcount(a)); }

// Tensor cores

template <class Sum>
struct MmaArguments {
  Sum* d;
  const uint32_t *a, *b;
  uint32_t meta;
};

// d[row][column] += Σ_k a(lanes, row, k) · b(lanes, k, column) over K inputs.
template <class Sum, class A, class B>
void multiply(MmaArguments<Sum>* const* lanes, int K, const A& a, const B& b) {
  ++emulator::machine().counters.mma;
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      Sum& d = lanes[row % 8 * 4 + column / 2]->d[row / 8 * 2 + column % 2];
      Sum sum = 0;
      for (int k = 0; k < K; ++k) sum += a(row, k) * b(k, column);
      d += sum;
    }
  }
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T type,
         Site site = Site::current()) {
  MmaArguments<float> mine{d, a, b, 0};
  block().together("mma", site, mine, [&](MmaArguments<float>* const* lanes) {
    multiply(
        lanes, 16,
        [&](int row, int k) {
          const uint32_t word = lanes[row % 8 * 4 + k % 8 / 2]->a[k / 8 * 2 + row / 8];
          return element(word, k % 2, type);
        },
        [&](int k, int column) {
          return element(lanes[column * 4 + k % 8 / 2]->b[k / 8], k % 2, type);
        });
  });
}

inline int32_t byte_of(uint32_t word, int i) { return static_cast<int8_t>(word >> (8 * i)); }

inline void mma(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int8_t,
                Site site = Site::current()) {
  MmaArguments<int32_t> mine{d, a, b, 0};
  block().together("mma", site, mine, [](MmaArguments<int32_t>* const* lanes) {
    multiply(
        lanes, 32,
        [&](int row, int k) {
          return byte_of(lanes[row % 8 * 4 + k % 16 / 4]->a[k / 16 * 2 + row / 8], k % 4);
        },
        [&](int k, int column) {
          return byte_of(lanes[column * 4 + k % 16 / 4]->b[k / 16], k % 4);
        });
  });
}

inline void mma(int32_t (&d)[4], const uint32_t (&a)[2], uint32_t b, int8_t type,
                Site site = Site::current()) {
  mma(d, {a[0], a[1], 0, 0}, {b, 0}, type, site);
}

// Input k of row `row` (0 … 15) of a 2:4 sparse a whose value i is kept(row, i); 0 if not kept.
template <class Kept>
int32_t sparse_element(MmaArguments<int32_t>* const* lanes, int row, int k, const Kept& kept) {
  const int four = k / 4;
  const uint32_t word = lanes[row % 8 * 4 + row / 8 + four / 8 * 2]->meta;
  const int places = static_cast<int>(word >> (four % 8 * 4) & 15);
  if (k % 4 == (places & 3)) return kept(row, four * 2);
  if (k % 4 == places >> 2) return kept(row, four * 2 + 1);
  return 0;
}
inline void check_metadata(MmaArguments<int32_t>* const* lanes, const char* what, Site site) {
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int four = 0; four < 8; ++four) {
      const uint32_t places = lanes[lane]->meta >> (four * 4) & 15;
      if ((places & 3) >= places >> 2) {
        block().fail(std::string(what) + ": metadata does not ascend", site);
      }
    }
  }
}

inline void mma_sp(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                   uint32_t metadata, Site site = Site::current()) {
  MmaArguments<int32_t> mine{d, a, b, metadata};
  block().together("mma_sp", site, mine, [&](MmaArguments<int32_t>* const* lanes) {
    check_metadata(lanes, "mma.sp", site);
    const auto kept = [&](int row, int i) {
      return byte_of(lanes[row % 8 * 4 + i % 16 / 4]->a[i / 16 * 2 + row / 8], i % 4);
    };
    multiply(
        lanes, 64, [&](int row, int k) { return sparse_element(lanes, row, k, kept); },
        [&](int k, int column) {
          return byte_of(lanes[column * 4 + k % 16 / 4]->b[k / 16], k % 4);
        });
  });
}

// wgmma: matrices are read through descriptors, when the product is waited for.

inline constexpr bool kHasWgmma = true;

inline uint64_t shared_address(const void* p) { return block().offset_of(p); }

inline void fence_proxy_async() { block().fence_async(); }
inline void warp_does(const char* name, Site site, const std::function<void()>& what) {
  int none = 0;
  block().together(name, site, none, [&](int* const*) { what(); });
}
inline void wgmma_fence(Site site = Site::current()) {
  warp_does("wgmma_fence", site, [] { block().fence_products(); });
}
inline void wgmma_commit(Site site = Site::current()) {
  warp_does("wgmma_commit", site, [] { block().commit_products(); });
}
template <int kPending>
void wgmma_wait(Site site = Site::current()) {
  warp_does("wgmma_wait", site, [] { block().wait_products(kPending); });
}

// The matrix of a descriptor, K-major: where the unit of 16 bytes `unit` of a row stands.
struct WgmmaMatrix {
  size_t start, eight_rows;
  int swizzle;  // of so many bits
  WgmmaMatrix(uint64_t descriptor, Site site)
      : start((descriptor & 0x3fff) << 4), eight_rows((descriptor >> 32 & 0x3fff) << 4) {
    const uint64_t type = descriptor >> 62;  // 0 none, 1 128 bytes, 2 64, 3 32
    if (type == 0 || (descriptor >> 49 & 7) != 0) {
      block().fail("a descriptor that is not emulated", site);
    }
    swizzle = 4 - static_cast<int>(type);
    if (eight_rows % (size_t{128} << swizzle) != 0) block().fail("rows off their swizzle", site);
  }
  size_t at(int row, int unit) const {
    const size_t row_bytes = size_t{16} << swizzle;
    const size_t address = start + row / 8 * eight_rows + row % 8 * row_bytes + unit * 16;
    return address ^ (address >> 7 & ((size_t{1} << swizzle) - 1)) << 4;
  }
};

inline void wgmma_sp(int32_t (&d)[96], uint64_t a, uint64_t b, uint32_t metadata,
                     Site site = Site::current()) {
  constexpr int kColumns = 192;
  MmaArguments<int32_t> mine{d, nullptr, nullptr, metadata};
  block().together("wgmma_sp", site, mine, [&](MmaArguments<int32_t>* const* given) {
    check_metadata(given, "wgmma.sp", site);
    const WgmmaMatrix values(a, site), tokens(b, site);
    const int warp = static_cast<int>(block().index().x) / kWarp % 4;
    std::vector<size_t> units;  // eight rows at once; tokens are read once, for all four warps
    for (int row = warp * 16; row < warp * 16 + 16; row += 8) {
      for (int i = 0; i < 16; ++i) units.push_back(values.at(row + i % 8, i / 8));
    }
    for (int column = 0; warp == 0 && column < kColumns; column += 8) {
      for (int i = 0; i < 32; ++i) units.push_back(tokens.at(column + i % 8, i / 8));
    }
    std::vector<MmaArguments<int32_t>> lanes;
    for (int lane = 0; lane < kWarp; ++lane) {
      lanes.push_back(*given[lane]);
      auto& sums = block().sums[given[lane]->d];
      if (sums.products++ == 0) {
        sums.values.assign(given[lane]->d, given[lane]->d + 96);
        std::fill_n(given[lane]->d, 96, 0x7f7f7f7f);
      }
    }
    const auto perform = [=] {
      emulator::machine().counters.mma += kColumns / 8;
      MmaArguments<int32_t> copies[kWarp];
      MmaArguments<int32_t>* pointers[kWarp];
      for (int lane = 0; lane < kWarp; ++lane) {
        copies[lane] = lanes[lane];
        pointers[lane] = &copies[lane];
      }
      const auto* const shared = reinterpret_cast<const int8_t*>(block().shared());
      const auto kept = [&](int row, int i) -> int32_t {
        return shared[values.at(warp * 16 + row, i / 16) + i % 16];
      };
      for (int row = 0; row < 16; ++row) {
        int32_t of_row[64];
        for (int k = 0; k < 64; ++k) of_row[k] = sparse_element(pointers, row, k, kept);
        for (int column = 0; column < kColumns; ++column) {
          int32_t sum = 0;
          for (int k = 0; k < 64; ++k)
            sum += of_row[k] * shared[tokens.at(column, k / 16) + k % 16];
          const int lane = row % 8 * 4 + column % 8 / 2;
          block().sums[lanes[lane].d].values[column / 8 * 4 + row / 8 * 2 + column % 2] += sum;
        }
      }
      for (int lane = 0; lane < kWarp; ++lane) {
        auto& sums = block().sums[lanes[lane].d];
        if (--sums.products == 0) std::copy_n(sums.values.begin(), 96, lanes[lane].d);
      }
    };
    block().issue(units, {a, b}, perform, site);
  });
}

}  // namespace ptx
}  // namespace llmq
