// Between canonical bitmap weights (values row by row) and the bitmap panels of kernels.h. Both
// ways are exact: what is kept stays kept, zeros among them. Here, and only here, positions are
// checked against counts; kernels trust the panels that they are given.
#include <bit>
#include <cstring>
#include <vector>

#include "bitmap.h"

namespace llmq {
namespace {

constexpr const char* kPack = "pack_bitmap_panels";
constexpr const char* kUnpack = "unpack_bitmap_panels";
constexpr uint8_t kFlip = 0x80;      // int8 code ↔ code + 128
constexpr int64_t kGrain = 1 << 14;  // inputs of panels that a thread takes: some 100 us

// Positions 4i … 4i + 3 of a row's mask; bits beyond K are dropped.
uint64_t four_bits(const uint8_t* row, int64_t i, int64_t K) {
  const int64_t left = K - 4 * i;
  const int inside = left >= 4 ? 15 : (1 << left) - 1;
  return (row[i / 2] >> (4 * (i & 1))) & inside;
}

uint64_t load_mask(const uint8_t* mask) {
  uint64_t bits = 0;
  for (int i = 0; i < 8; ++i) bits |= static_cast<uint64_t>(mask[i]) << (8 * i);
  return bits;
}

// The positions of block i that lie inside [N, K], for a panel of `lanes` outputs.
uint64_t inside(int64_t lanes, int64_t i, int64_t K) {
  const int64_t left = K - 4 * i;
  const uint64_t four = left >= 4 ? 15 : (1 << left) - 1;
  const uint64_t all = four * 0x1111111111111111u;
  return lanes >= kPanel ? all : all & ((uint64_t{1} << (4 * lanes)) - 1);
}

}  // namespace

void check_bitmap_shapes(const char* op, const Tensor& weight, const Tensor& weight_bitmask,
                         const Tensor& row_offsets, int64_t N, int64_t K) {
  const bool panels = weight_bitmask.dim() == 3 && weight_bitmask.size(2) == 8 &&
                      weight.scalar_type() == ScalarType::Char;
  LLMQ_CHECK(
      weight_bitmask.scalar_type() == ScalarType::Byte && (panels || weight_bitmask.dim() == 2), op,
      "weight_bitmask must be uint8 [N, K / 8], panels or tiles, got ", shown(weight_bitmask));
  check_width(op, K, weight_bitmask.size(1), panels ? 4 : 8);
  const int64_t rows = panels ? ceil_div(N, kPanel) : N;
  LLMQ_CHECK(weight_bitmask.size(0) == rows, op, "weight_bitmask must have ", rows,
             panels ? " panels" : " rows", " for ", N, " output features, got ",
             weight_bitmask.size(0));
  LLMQ_CHECK(row_offsets.scalar_type() == ScalarType::Long && row_offsets.dim() == 1 &&
                 row_offsets.size(0) == rows + 1,
             op, "row_offsets must be int64 [", rows + 1, "], got ", shown(row_offsets));
  LLMQ_CHECK(weight.dim() == 1, op, "weight must be the kept values, one after another, got ",
             shape_of(weight));
}

void check_bitmap(const char* op, const Tensor& weight, const Tensor& weight_bitmask,
                  const Tensor& row_offsets, int64_t N, int64_t K) {
  const int64_t bytes = ceil_div(K, 8);
  check_bitmap_shapes(op, weight, weight_bitmask, row_offsets, N, K);
  LLMQ_CHECK(weight_bitmask.dim() == 2, op, "weight_bitmask must be [N, K / 8], got ",
             shape_of(weight_bitmask));
  const auto* const offsets = static_cast<const int64_t*>(row_offsets.const_data_ptr());
  const auto* mask = static_cast<const uint8_t*>(weight_bitmask.const_data_ptr());
  bool together = offsets[0] == 0 && offsets[N] == weight.numel();
  for (int64_t n = 0; n < N && together; ++n) {
    const uint8_t* row = mask + n * bytes;
    int64_t count = 0, i = 0;
    for (; i + 8 <= K / 8; i += 8) count += std::popcount(load_mask(row + i));
    for (int64_t j = 2 * i; j < ceil_div(K, 4); ++j) count += std::popcount(four_bits(row, j, K));
    together = offsets[n + 1] - offsets[n] == count;
  }
  LLMQ_CHECK(together, op, "weight, weight_bitmask and row_offsets do not belong together");
}

BitmapPanels check_bitmap_panels(const char* op, const Tensor& weight, const Tensor& weight_bitmask,
                                 const Tensor& panel_offsets, int64_t N, int64_t K) {
  check_bitmap_shapes(op, weight, weight_bitmask, panel_offsets, N, K);
  LLMQ_CHECK(weight_bitmask.dim() == 3, op, "weight_bitmask must be panels, got ",
             shape_of(weight_bitmask));
  LLMQ_CHECK(
      weight.is_contiguous() && weight_bitmask.is_contiguous() && panel_offsets.is_contiguous(), op,
      "bitmap panels must be contiguous");
  const int64_t P = ceil_div(N, kPanel);
  const auto* const start = static_cast<const int64_t*>(panel_offsets.const_data_ptr());
  bool ordered = start[0] == 0 && start[P] + kBlockBytes == weight.numel();
  for (int64_t p = 0; p < P; ++p) ordered = ordered && start[p] <= start[p + 1];
  LLMQ_CHECK(ordered, op, "offsets of panels must rise from 0 to ", weight.numel() - kBlockBytes,
             ", the kept values before 64 bytes of padding");
  return {static_cast<const uint8_t*>(weight.const_data_ptr()),
          static_cast<const uint8_t*>(weight_bitmask.const_data_ptr()), start};
}

Tensors3 pack_bitmap_panels(const Tensor& weight, const Tensor& weight_bitmask,
                            const Tensor& row_offsets, int64_t K) {
  LLMQ_CHECK(weight.scalar_type() == ScalarType::Char, kPack,
             "weight must be int8, the only values that panels hold, got ",
             dtype_name(weight.scalar_type()));
  LLMQ_CHECK(K >= 0 && weight_bitmask.dim() == 2, kPack,
             "weight_bitmask must be [N, ceil(K/8)] and K not negative, got ", weight_bitmask.dim(),
             " dimensions and K=", K);
  const int64_t N = weight_bitmask.size(0), P = ceil_div(N, kPanel), K4 = ceil_div(K, 4);
  const Tensor values = as_contiguous(weight), bits = as_contiguous(weight_bitmask),
               rows = as_contiguous(row_offsets);
  check_bitmap(kPack, values, bits, rows, N, K);
  const auto* source = static_cast<const uint8_t*>(values.const_data_ptr());
  const auto* source_mask = static_cast<const uint8_t*>(bits.const_data_ptr());
  const auto* offsets = static_cast<const int64_t*>(rows.const_data_ptr());

  const int64_t total = offsets[N];
  const int64_t weight_size[] = {total + kBlockBytes}, mask_size[] = {P, K4, 8};
  const int64_t start_size[] = {P + 1};
  const Tensor packed = empty(weight_size, 1, ScalarType::Char);
  const Tensor packed_mask = empty(mask_size, 3, ScalarType::Byte);
  const Tensor panel_offsets = empty(start_size, 1, ScalarType::Long);
  auto* target = static_cast<uint8_t*>(packed.mutable_data_ptr());
  auto* target_mask = static_cast<uint8_t*>(packed_mask.mutable_data_ptr());
  auto* start = static_cast<int64_t*>(panel_offsets.mutable_data_ptr());
  for (int64_t p = 0; p < P; ++p) start[p] = offsets[p * kPanel];
  start[P] = total;
  std::memset(target + total, kFlip, kBlockBytes);

  for_panels(N, K, kGrain, [&](int64_t p) {
    const int64_t first = p * kPanel, lanes = N - first < kPanel ? N - first : kPanel;
    const uint8_t* from[kPanel];
    for (int64_t lane = 0; lane < lanes; ++lane) from[lane] = source + offsets[first + lane];
    uint8_t* to = target + start[p];
    for (int64_t i = 0; i < K4; ++i) {
      uint64_t block = 0;
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const uint8_t* row = source_mask + (first + lane) * ceil_div(K, 8);
        const uint64_t four = four_bits(row, i, K);
        block |= four << (4 * lane);
        for (int kept = std::popcount(four); kept > 0; --kept) *to++ = *from[lane]++ ^ kFlip;
      }
      uint8_t* mask = target_mask + (p * K4 + i) * 8;
      for (int j = 0; j < 8; ++j) mask[j] = static_cast<uint8_t>(block >> (8 * j));
    }
  });
  return {packed, packed_mask, panel_offsets};
}

Tensors3 unpack_bitmap_panels(const Tensor& weight, const Tensor& weight_bitmask,
                              const Tensor& panel_offsets, int64_t N, int64_t K) {
  LLMQ_CHECK(N >= 0 && K >= 0, kUnpack, "N and K must not be negative, got ", N, " and ", K);
  const Tensor values = as_contiguous(weight), bits = as_contiguous(weight_bitmask),
               panel_starts = as_contiguous(panel_offsets);
  const BitmapPanels panels = check_bitmap_panels(kUnpack, values, bits, panel_starts, N, K);
  const int64_t P = ceil_div(N, kPanel), K4 = ceil_div(K, 4), bytes = ceil_div(K, 8);

  const int64_t offsets_size[] = {N + 1}, mask_size[] = {N, bytes};
  const Tensor row_offsets = empty(offsets_size, 1, ScalarType::Long);
  const Tensor row_mask = empty(mask_size, 2, ScalarType::Byte);
  auto* offsets = static_cast<int64_t*>(row_offsets.mutable_data_ptr());
  auto* target_mask = static_cast<uint8_t*>(row_mask.mutable_data_ptr());
  if (N * bytes > 0) std::memset(target_mask, 0, N * bytes);
  std::vector<uint8_t> consistent(P);
  for_panels(N, K, kGrain, [&](int64_t p) {
    const int64_t first = p * kPanel, lanes = N - first < kPanel ? N - first : kPanel;
    int64_t count[kPanel] = {}, all = 0;
    bool within = true;
    for (int64_t i = 0; i < K4; ++i) {
      const uint64_t block = load_mask(panels.mask + (p * K4 + i) * 8);
      within = within && (block & ~inside(lanes, i, K)) == 0;
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const uint64_t four = block >> (4 * lane) & 15;
        count[lane] += std::popcount(four);
        target_mask[(first + lane) * bytes + i / 2] |= static_cast<uint8_t>(four << (4 * (i & 1)));
      }
    }
    for (int64_t lane = 0; lane < lanes; ++lane) {
      offsets[first + lane + 1] = count[lane];
      all += count[lane];
    }
    consistent[p] = within && all == panels.start[p + 1] - panels.start[p];
  });
  for (int64_t p = 0; p < P; ++p) {
    LLMQ_CHECK(consistent[p], kUnpack,
               "weight, weight_bitmask and the offsets of panels do not belong together");
  }
  offsets[0] = 0;
  for (int64_t n = 0; n < N; ++n) offsets[n + 1] += offsets[n];

  const int64_t weight_size[] = {offsets[N]};
  const Tensor row_values = empty(weight_size, 1, ScalarType::Char);
  auto* target = static_cast<uint8_t*>(row_values.mutable_data_ptr());
  for_panels(N, K, kGrain, [&](int64_t p) {
    const int64_t first = p * kPanel, lanes = N - first < kPanel ? N - first : kPanel;
    uint8_t* to[kPanel];
    for (int64_t lane = 0; lane < lanes; ++lane) to[lane] = target + offsets[first + lane];
    const uint8_t* from = panels.weight + panels.start[p];
    for (int64_t i = 0; i < K4; ++i) {
      const uint64_t block = load_mask(panels.mask + (p * K4 + i) * 8);
      for (uint64_t left = block; left != 0; left &= left - 1) {
        *to[std::countr_zero(left) / 4]++ = *from++ ^ kFlip;
      }
    }
  });
  return {row_values, row_mask, row_offsets};
}

}  // namespace llmq
