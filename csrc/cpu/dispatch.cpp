#include "dispatch.h"

namespace llmq {

// The one table family × instruction set: a row a family, a column an Isa. To add a family: its
// struct and functions in kernels.h, its accessor in dispatch.h, its row here.
#if defined(__x86_64__)
#define LLMQ_FAMILY(fn, family)                                                        \
  fn* family() {                                                                       \
    static constexpr fn* kRow[] = {family##_portable, family##_avx2, family##_avxvnni, \
                                   family##_avx512vnni};                               \
    return kRow[static_cast<int>(current_isa())];                                      \
  }
#elif defined(__aarch64__)
#define LLMQ_FAMILY(fn, family)                                                         \
  fn* family() {                                                                        \
    static constexpr fn* kRow[] = {family##_portable, family##_neondot, family##_i8mm}; \
    return kRow[static_cast<int>(current_isa())];                                       \
  }
#else
#define LLMQ_FAMILY(fn, family) \
  fn* family() { return family##_portable; }
#endif

// Instruction sets that do without a family, or share a kernel with another.
static constexpr SplitRowsFn* split_rows_portable = nullptr;
static constexpr CodebookInt8GemvFn* codebook_int8_gemv_portable = nullptr;
#if defined(__x86_64__)
static constexpr CodebookInt8GemvFn *codebook_int8_gemv_avx2 = nullptr,
                                    *codebook_int8_gemv_avxvnni = nullptr;
static constexpr WeightOnlyPanelFn *weight_only_gemv_avx2 = nullptr,
                                   *weight_only_gemv_avxvnni = nullptr,
                                   *weight_only_gemv_avx512vnni = nullptr;
static constexpr PanelScalesFn* panel_scales_avxvnni = panel_scales_avx2;
static constexpr ConvertRowsFn *to_float_avxvnni = to_float_avx2,
                               *from_float_avxvnni = from_float_avx2;
static constexpr QuantizeRowsFn* quantize_rows_avxvnni = quantize_rows_avx2;
static constexpr BitmapGemmFn* bitmap_gemm_avxvnni = bitmap_gemm_avx2;
static constexpr BitmapExpandFn* bitmap_expand_avxvnni = bitmap_expand_avx2;
static constexpr SplitRowsFn* split_rows_avxvnni = split_rows_avx2;
static constexpr WeightOnlyPanelFn* weight_only_dequantize_avxvnni = weight_only_dequantize_avx2;
static constexpr CodebookPanelFn *codebook_dequantize_avxvnni = codebook_dequantize_avx2,
                                 *codebook_gemv_avxvnni = codebook_gemv_avx2;
static constexpr PanelGemmFn* panel_gemm_avxvnni = panel_gemm_avx2;
static constexpr AttentionFn* attention_avxvnni = attention_avx2;
static constexpr RmsNormFn* rms_norm_avxvnni = rms_norm_avx2;
static constexpr SiluMulFn* silu_mul_avxvnni = silu_mul_avx2;
static constexpr RopeFn* rope_avxvnni = rope_avx2;
static constexpr AddRowsFn* add_rows_avxvnni = add_rows_avx2;
#elif defined(__aarch64__)
static constexpr CodebookInt8GemvFn *codebook_int8_gemv_neondot = nullptr,
                                    *codebook_int8_gemv_i8mm = nullptr;
static constexpr WeightOnlyPanelFn *weight_only_gemv_neondot = nullptr,
                                   *weight_only_gemv_i8mm = nullptr;
static constexpr PanelScalesFn *panel_scales_neondot = panel_scales_portable,
                               *panel_scales_i8mm = panel_scales_portable;
static constexpr ConvertRowsFn *to_float_i8mm = to_float_neondot,
                               *from_float_i8mm = from_float_neondot;
static constexpr QuantizeRowsFn* quantize_rows_i8mm = quantize_rows_neondot;
static constexpr BitmapGemmFn* bitmap_gemm_i8mm = bitmap_gemm_neondot;
static constexpr BitmapExpandFn* bitmap_expand_i8mm = bitmap_expand_neondot;
static constexpr SplitRowsFn* split_rows_i8mm = split_rows_neondot;
static constexpr WeightOnlyInt8GemmFn* weight_only_int8_gemm_i8mm = weight_only_int8_gemm_neondot;
static constexpr WeightOnlyPanelFn* weight_only_dequantize_i8mm = weight_only_dequantize_neondot;
static constexpr CodebookPanelFn *codebook_dequantize_i8mm = codebook_dequantize_neondot,
                                 *codebook_gemv_i8mm = codebook_gemv_neondot;
static constexpr PanelGemmFn* panel_gemm_i8mm = panel_gemm_neondot;
static constexpr AttentionFn *attention_neondot = attention_portable,
                             *attention_i8mm = attention_portable;
static constexpr RmsNormFn *rms_norm_neondot = rms_norm_portable,
                           *rms_norm_i8mm = rms_norm_portable;
static constexpr SiluMulFn *silu_mul_neondot = silu_mul_portable,
                           *silu_mul_i8mm = silu_mul_portable;
static constexpr RopeFn *rope_neondot = rope_portable, *rope_i8mm = rope_portable;
static constexpr AddRowsFn *add_rows_neondot = add_rows_portable,
                           *add_rows_i8mm = add_rows_portable;
#endif

LLMQ_FAMILY(ConvertRowsFn, to_float)
LLMQ_FAMILY(ConvertRowsFn, from_float)
LLMQ_FAMILY(QuantizeRowsFn, quantize_rows)
LLMQ_FAMILY(Int8GemmFn, int8_gemm)
LLMQ_FAMILY(BitmapGemmFn, bitmap_gemm)
LLMQ_FAMILY(BitmapExpandFn, bitmap_expand)
LLMQ_FAMILY(PanelScalesFn, panel_scales)
LLMQ_FAMILY(SplitRowsFn, split_rows)
LLMQ_FAMILY(WeightOnlyInt8GemmFn, weight_only_int8_gemm)
LLMQ_FAMILY(WeightOnlyPanelFn, weight_only_dequantize)
LLMQ_FAMILY(WeightOnlyPanelFn, weight_only_gemv)
LLMQ_FAMILY(CodebookPanelFn, codebook_dequantize)
LLMQ_FAMILY(CodebookPanelFn, codebook_gemv)
LLMQ_FAMILY(CodebookInt8GemvFn, codebook_int8_gemv)
LLMQ_FAMILY(PanelGemmFn, panel_gemm)
LLMQ_FAMILY(AttentionFn, attention)
LLMQ_FAMILY(RmsNormFn, rms_norm)
LLMQ_FAMILY(SiluMulFn, silu_mul)
LLMQ_FAMILY(RopeFn, rope)
LLMQ_FAMILY(AddRowsFn, add_rows)

// AVX2 multiplies int8 at half the rate of floats once the weights' conversion is shared. With
// AVX-VNNI, 4096×4096 took 0.4 times as long split as in floats for 4 tokens, 0.7 times (8 bits)
// and as long (4 bits) for 256. On Arm three sdot do 16 products where floats need four fmla.
int64_t split_tokens() {
#if defined(__aarch64__)
  static constexpr int64_t kRow[] = {0, INT64_MAX, INT64_MAX};
#else
  static constexpr int64_t kRow[] = {0, 1, INT64_MAX, INT64_MAX};
#endif
  return kRow[static_cast<int>(current_isa())];
}

}  // namespace llmq
