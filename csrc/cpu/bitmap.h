// Bitmap weights as pointers, checked; shared by the packing and the driver.
#pragma once

#include "driver.h"

namespace llmq {

struct BitmapPanels {
  const uint8_t* weight;  // kept bytes and 64 bytes of padding
  const uint8_t* mask;    // [ceil(N/16), K4, 8]
  const int64_t* start;   // [ceil(N/16) + 1]
};

// Checks dtypes and shapes of rows or panels in the words of llmq/ops/sparse.py.
void check_bitmap_shapes(const char* op, const Tensor& weight, const Tensor& weight_bitmask,
                         const Tensor& row_offsets, int64_t N, int64_t K);

// Checks shapes, dtypes and order; unpack_bitmap_panels also checks each mask against its count.
BitmapPanels check_bitmap_panels(const char* op, const Tensor& weight, const Tensor& weight_bitmask,
                                 const Tensor& panel_offsets, int64_t N, int64_t K);

// Checks canonical storage [N, K] in full, masks against counts included.
void check_bitmap(const char* op, const Tensor& weight, const Tensor& weight_bitmask,
                  const Tensor& row_offsets, int64_t N, int64_t K);

}  // namespace llmq
