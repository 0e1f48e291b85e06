// bitmap_sparse_linear for few tokens: y = x Wᵀ + bias of which one bit a weight and the values are
// read: W int8 with int8 or floating-point inputs, or in the inputs' own type.
//
// At density d a weight is d + 0.13 bytes (int8; 2d + 0.14 otherwise). Of an H100's bandwidth,
// issuing the instructions of up to 8 tokens allows (benchmarks/results/static/cuda.json; not yet
// measured)
//
//     values  inputs  instructions a weight   at d = 0.5   at d = 0.3
//     int8    int8                      3.4         1.66         1.14
//     int8    f16                       4.5         1.25         0.86
//     int8    bf16                      5.4         1.04         0.71
//     16 bits                           7.0         1.45         0.94
//
// and reading shared memory, where lanes meet in banks, less: 1.10 (int8 inputs) and 0.84, as the
// emulator counts 1.27 and 1.15 wavefronts for 32 int8 weights at these densities.
// For more tokens `expand` writes the matrix out, for a dense product to take.
#include "bitmap_tiles.cuh"
#include "launch_small_gemm.cuh"

namespace llmq::cuda {
namespace {

template <class T>
void of_floats(const SmallGemm& g, int value_bytes, void* stream) {
  value_bytes == 1 ? launch_small_gemm<Bitmap<1>, Floats<T, 8>>(g, stream)
                   : launch_small_gemm<Bitmap<2>, Floats<T, 8>>(g, stream);
}

// A warp writes 32 outputs of a chunk. Columns past K are not written; K is a multiple of 4.
template <int kSize>
__global__ void __launch_bounds__(kThreads) expand(const SmallGemm g) {
  using Weight = Bitmap<kSize>;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int first = static_cast<int>(blockIdx.y) * kBlockOutputs + warp * kWarpOutputs;
  const int chunk = static_cast<int>(blockIdx.z);  // a slice
  unsigned char* const stage = ptx::shared_memory() + warp * Weight::kStageBytes;
  Weight weight(g, first, chunk, lane);
  weight.copy(stage, chunk, lane);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::barrier();
#pragma unroll
  for (int pair = 0; pair < Weight::kPairs; ++pair) {
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
      uint32_t words[Weight::kWords];
      weight.load(words, stage, r, pair, lane);
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // two units of 4 inputs, two rows
        const int n = first + r * kTileRows + i % 2 * 8 + lane / 4;
        const int k = chunk * Weight::kChunk + pair * 32 + i / 2 * 16 + lane % 4 * 4;
        if (n >= g.N || k >= g.K) continue;
        auto* const to =
            static_cast<unsigned char*>(g.y) + (static_cast<int64_t>(n) * g.K + k) * kSize;
        if constexpr (kSize == 1) {
          ptx::st_global(reinterpret_cast<uint32_t*>(to), words[i]);
        } else {
          const Words2 four{{words[i / 2 * 4 + i % 2], words[i / 2 * 4 + 2 + i % 2]}};
          ptx::st_global(reinterpret_cast<Words2*>(to), four);
        }
      }
    }
  }
}

template <int kSize>
void launch_expand(SmallGemm g, void* stream) {
  using Weight = Bitmap<kSize>;
  g.splits = ceil_div(g.K, Weight::kChunk);
  const Launch grid{1,
                    static_cast<unsigned>(ceil_div(g.N, kBlockOutputs)),
                    static_cast<unsigned>(g.splits),
                    kThreads,
                    kWarps * Weight::kStageBytes,
                    stream};
  launch(expand<kSize>, grid, g);
}

}  // namespace

void bitmap_gemm(const SmallGemm& g, int value_bytes, bool codes, void* stream) {
  if (codes) {
    g.x_groups == 1 ? launch_small_gemm<Bitmap<1>, Codes<false>>(g, stream)
                    : launch_small_gemm<Bitmap<1>, Codes<true>>(g, stream);
  } else if (g.x_dtype == Dtype::f16) {
    of_floats<Half>(g, value_bytes, stream);
  } else {
    of_floats<BFloat16>(g, value_bytes, stream);
  }
}

void bitmap_expand(const SmallGemm& g, int value_bytes, void* stream) {
  value_bytes == 1 ? launch_expand<1>(g, stream) : launch_expand<2>(g, stream);
}

}  // namespace llmq::cuda
