// Gives each family's microkernel for the instruction set in use.
#pragma once

#include "isa.h"
#include "kernels.h"

namespace llmq {

ConvertRowsFn* to_float();
ConvertRowsFn* from_float();
QuantizeRowsFn* quantize_rows();
Int8GemmFn* int8_gemm();
BitmapGemmFn* bitmap_gemm();
BitmapExpandFn* bitmap_expand();
PanelScalesFn* panel_scales();
SplitRowsFn* split_rows();  // null where float activations are always multiplied as floats
int64_t split_tokens();     // up to that many tokens are faster split
WeightOnlyInt8GemmFn* weight_only_int8_gemm();
WeightOnlyPanelFn* weight_only_dequantize();
WeightOnlyPanelFn* weight_only_gemv();  // null where split_rows is not
CodebookPanelFn* codebook_dequantize();
CodebookPanelFn* codebook_gemv();
CodebookInt8GemvFn* codebook_int8_gemv();  // null where look-ups of bytes are no faster
PanelGemmFn* panel_gemm();
AttentionFn* attention();
RmsNormFn* rms_norm();
SiluMulFn* silu_mul();
RopeFn* rope();
AddRowsFn* add_rows();

}  // namespace llmq
