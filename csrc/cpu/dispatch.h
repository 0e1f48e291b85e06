// Gives each family's microkernel for the instruction set in use.
#pragma once

#include "isa.h"
#include "kernels.h"

namespace llmq {

ConvertRowsFn* to_float();
ConvertRowsFn* from_float();
QuantizeRowsFn* quantize_rows();
Int8GemmFn* int8_gemm();

}  // namespace llmq
