// The contract of every microkernel: what a driver (one .cpp a family) and its kernels share.
//
// A microkernel gets plain pointers to checked, sized memory; it neither allocates, threads, checks
// nor knows torch. An instruction-set file includes intrinsics, this header, and headers that only
// such files share (neon.h, quantize_rows.h); nothing else. Helpers, in those headers too, stand in
// an anonymous namespace: inline functions compiled with different flags under one name would be
// merged by the linker (ODR).
//
// M tokens, N outputs, K inputs; x [M, K], y [M, N]. Strides are in elements.
//
// panels8: P = ceil(N/16) panels, each K4 = ceil(K/4) blocks of 64 bytes, one vector register:
//
//     block i of panel p      byte 0    1    2    3  | 4 ...             | ... 63
//                             w[n,k] k+1  k+2  k+3  | w[n+1,k] ...      | w[n+15,k+3]
//                             n = 16p, k = 4i; byte = code + 128 (code ^ 0x80); padding 0x80
//
// panels4: the same with K8 = ceil(K/8) blocks: byte 4n+j holds input 8i+j of lane n in its low
// nibble and input 8i+4+j in its high nibble; padding nibble = 0.
#pragma once

#include <cstdint>

namespace llmq {

inline constexpr int64_t kPanel = 16;  // outputs a panel: the int32 lanes of a 512-bit register
inline constexpr int64_t kBlockBytes = 64;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

// to_float, from_float: rows of any float type to and from float32
struct ConvertRows {
  const void* source;
  int64_t source_stride;
  void* target;
  int64_t target_stride;
  int64_t rows, columns;
  Dtype dtype;  // of source in to_float, of target in from_float; the other side is float32
};
using ConvertRowsFn = void(const ConvertRows&);
ConvertRowsFn to_float_portable, to_float_avx2, to_float_avx512vnni, to_float_neondot;
ConvertRowsFn from_float_portable, from_float_avx2, from_float_avx512vnni, from_float_neondot;

// quantize_rows: symmetric int8 codes, one scale a token or group of inputs
// scale = max|x| / 127, code = round_half_even(x · (127 / max|x|)); a row whose max|x| is at most
// 1e-30 gets codes 0 and its own scale, one with NaN or infinity codes 0 and scale NaN.
// With a given scale, code = round_half_even(clamp(x · (1 / scale), ±127)), in one pass; a given
// scale that is not in (1e-30, infinity) is as an input that is NaN.
struct QuantizeRows {
  const void* x;  // [rows, K]
  int64_t x_stride;
  Dtype dtype;
  int64_t rows, K;
  int64_t group_size;  // divides K; K for one scale a token
  int8_t* codes;       // [rows, codes_stride]; columns K … codes_columns are set to 0
  int64_t codes_stride;
  int64_t codes_columns;
  float* scale;     // [rows, K / group_size]
  int32_t* offset;  // [rows, K / group_size] −128 · Σ codes, what u8 weights add too much; or null
  const float* given = nullptr;  // the scale of all rows; null: from their inputs
};
using QuantizeRowsFn = void(const QuantizeRows&);
QuantizeRowsFn quantize_rows_portable, quantize_rows_avx2, quantize_rows_avx512vnni,
    quantize_rows_neondot;

// int8_gemm: y = (Σ_groups (dot of codes) · x_scale) · weight_scale + bias
struct Int8Gemm {
  const uint8_t* weight;  // panels8 [ceil(N/16), K4, 16, 4]
  const int8_t* x;        // codes [M, x_stride], zero from K to 4·K4
  int64_t x_stride;
  const float* x_scale;       // [M, groups]
  const int32_t* x_offset;    // [M, groups] −128 · Σ codes
  const float* weight_scale;  // [N]
  const float* bias;          // [N] or null
  float* y;                   // [M, y_stride]
  int64_t y_stride;
  int64_t M, N, K4;
  int64_t groups;  // equal groups of K4 / groups blocks
};
using Int8GemmFn = void(const Int8Gemm&);
Int8GemmFn int8_gemm_portable, int8_gemm_avx2, int8_gemm_avxvnni, int8_gemm_avx512vnni,
    int8_gemm_neondot, int8_gemm_i8mm;

// bitmap_gemm: int8_gemm without the weights that were pruned
// The 64 bytes of a panels8 block are kept as a mask, little endian (bit 4·lane + j), and the bytes
// whose bit is set, in order; an absent byte stands for 0x80, code 0:
//
//     mask    [P, K4, 8]    0b…1101    0b…0110      blocks of one panel
//     weight  kept bytes    a b c      d e          panel after panel, then 64 bytes of padding
//                           a 80 b c   80 d e 80    what they stand for
struct BitmapGemm {
  Int8Gemm dense;        // its weight: the kept bytes
  const uint8_t* mask;   // [ceil(N/16), K4, 8]
  const int64_t* start;  // [ceil(N/16)] where each panel's kept bytes begin
};
using BitmapGemmFn = void(const BitmapGemm&);
BitmapGemmFn bitmap_gemm_portable, bitmap_gemm_avx2, bitmap_gemm_avx512vnni, bitmap_gemm_neondot;

// Writes consecutive blocks out as panels8, for int8_gemm to run over many tokens.
struct BitmapExpand {
  const uint8_t* weight;
  const uint8_t* mask;  // [blocks, 8]
  int64_t blocks;
  uint8_t* panels;  // [blocks, 64]
};
using BitmapExpandFn = void(const BitmapExpand&);
BitmapExpandFn bitmap_expand_portable, bitmap_expand_avx2, bitmap_expand_avx512vnni,
    bitmap_expand_neondot;

// Grouped weights: weight_only_linear and codebook_linear
// Their kernels take one panel and a tile of up to kTile rows whose inputs lie side by side, so
// that one pointer walks x and each weight, once in a register, serves every row:
//     floats  x [K, rows];    codes  x [K4, rows, 4], K filled up with zeros to whole blocks.
// A segment is a run of inputs under one scale of weight and activation; the last may be shorter.
// Except in portable kernels it holds whole blocks. y [rows, 16] has neither bias nor dtype yet.
inline constexpr int64_t kTile = 12;

// Turns a panel's scales so that a register holds those of its 16 outputs; absent outputs get 0.
struct PanelScales {
  const float* scale;        // [lanes, groups]; null where scales stand in panels already
  const int8_t* zero_point;  // [lanes, groups], or [groups, 16] where scale is null; or null
  int64_t lanes, groups;
  int bits;             // null zero_point: code 0 (bits 8) or 8 (bits 4); 0: no zero points wanted
  float* scale_panel;   // [groups, 16]
  int32_t* zero_panel;  // [groups, 16] as stored: + 128 for bits 8; null if bits is 0
};
using PanelScalesFn = void(const PanelScales&);
PanelScalesFn panel_scales_portable, panel_scales_avx2, panel_scales_avx512vnni;

// Splits float32 rows into three int8 digits an input: x ≈ scale · (B²·a + B·b + c), where max|x|
// of a segment is close to 127 · (B² + B + 1). B = 256, or 255 for AVX2, whose products take no
// −128. Returns false if a row is beyond what they can hold: NaN, infinity, or a segment whose
// max|x| is over 1e30 or under 1e-30 without being zero.
struct SplitRows {
  const float* x;  // [rows, x_stride]
  int64_t x_stride, rows, K, segment;
  int8_t* digits;  // [rows, 3, digits_stride]; columns K … digits_columns are set to 0
  int64_t digits_stride, digits_columns;
  float* scale;     // [rows, 3, segments], B², B and 1 times the scale
  int32_t* offset;  // [rows, 3, segments] −128 · Σ digits
};
using SplitRowsFn = bool(const SplitRows&);
SplitRowsFn split_rows_avx2, split_rows_avx512vnni, split_rows_neondot;

// y = Σ_segments weight scale · x scale · Σ_k (w − zero) · x, the inner sum exact in int32.
struct WeightOnlyInt8Gemm {
  const uint8_t* weight;  // one panel
  int bits;               // 8 or 4
  const float* scale;     // [groups, 16]
  const int32_t* zero;    // [groups, 16]
  int64_t K, segment, segments_per_group;
  const int8_t* x;       // codes of the tile
  const float* x_scale;  // [segments, rows]
  const int32_t* x_sum;  // [segments, rows] −Σ codes
  int64_t rows;
  float* y;                 // [rows, 16]
  const float* next_scale;  // canonical scales and zero points of the next panel, to be fetched
  const int8_t* next_zero;  // meanwhile, or null
};
using WeightOnlyInt8GemmFn = void(const WeightOnlyInt8Gemm&);
WeightOnlyInt8GemmFn weight_only_int8_gemm_portable, weight_only_int8_gemm_avx2,
    weight_only_int8_gemm_avxvnni, weight_only_int8_gemm_avx512vnni, weight_only_int8_gemm_neondot;

// Inputs k … k + count of a panel as floats, (w − zero) · scale; both on block borders unless they
// end K or the kernel is portable. gemv multiplies them with one row: y = Σ_k w · x.
struct WeightOnlyPanel {
  const uint8_t* weight;
  int bits;
  const float* scale;   // [groups, 16]
  const int32_t* zero;  // [groups, 16]
  int64_t K, group;
  int64_t k, count;
  float* dense;    // [count, 16], for dequantize
  const float* x;  // [K], zero up to whole blocks, for gemv
  float* y;        // [16], for gemv
};
using WeightOnlyPanelFn = void(const WeightOnlyPanel&);
WeightOnlyPanelFn weight_only_dequantize_portable, weight_only_dequantize_avx2,
    weight_only_dequantize_avx512vnni, weight_only_dequantize_neondot;
WeightOnlyPanelFn weight_only_gemv_portable;  // others split the row instead

// The same for w = codebook[code] · scale.
struct CodebookPanel {
  const uint8_t* weight;
  int bits;
  const float* codebook;    // [2^bits], by stored byte (code ^ 0x80 for bits 8)
  int64_t codebook_stride;  // 2^bits where each of the 16 outputs has its own (portable only), or 0
  const uint8_t* planes;    // [4, 256] byte i of each float32 of codebook, for bits 8 and stride 0
  const float* scale;       // [groups, 16]
  int64_t K, group;
  int64_t k, count;
  float* dense;
  const float* x;
  float* y;
};
using CodebookPanelFn = void(const CodebookPanel&);
CodebookPanelFn codebook_dequantize_portable, codebook_dequantize_avx2,
    codebook_dequantize_avx512vnni, codebook_dequantize_neondot;
CodebookPanelFn codebook_gemv_portable, codebook_gemv_avx2, codebook_gemv_avx512vnni,
    codebook_gemv_neondot;

// One token times a panel of an 8-bit codebook whose entries are split as split_rows splits inputs:
// entry = unit · (65536·a + 256·b + c − 2^23) with digits a, b, c of 0 … 255.
struct CodebookInt8Gemv {
  const uint8_t* weight;
  const uint8_t* digits;  // [3, 256] a, b and c by stored byte
  bool third;             // whether any c is not 0
  float unit;
  const float* scale;  // [groups, 16]
  int64_t K, segment, segments_per_group;
  const int8_t* x;       // digits of the tile: [K4, 3, 4]
  const float* x_scale;  // [segments, 3]
  const int32_t* x_sum;  // [segments, 3] −Σ digits
  float* y;              // [16]
};
using CodebookInt8GemvFn = void(const CodebookInt8Gemv&);
CodebookInt8GemvFn codebook_int8_gemv_avx512vnni;

// y += x Wᵀ of one dequantized panel.
struct PanelGemm {
  const float* dense;  // [K, 16]
  const float* x;      // [K, rows]
  int64_t K, rows;
  float* y;  // [rows, 16]
};
using PanelGemmFn = void(const PanelGemm&);
PanelGemmFn panel_gemm_portable, panel_gemm_avx2, panel_gemm_avx512vnni, panel_gemm_neondot;

// attention over float keys and values, for queries that share a head of them
// out[q] = Σ_s softmax_s(scaling · query[q] · key[s] + mask[q, s]) · value[s] over s < visible[q]
inline constexpr int64_t kAttentionLanes = 32;  // queries of a tile
inline constexpr int64_t kAttentionKeys = 112;  // room for the scores of that many keys
struct AttentionTile {
  const float* keys;    // [max of visible, stride]
  const float* values;  // likewise
  int64_t stride, D;
  const float* const* query;  // [lanes] rows of D
  float* const* out;          // [lanes] rows of D
  const int64_t* visible;     // [lanes] at least 1
  const float* const* mask;   // [lanes] rows to be added to the scores, or null
  int64_t lanes;
  float scaling;
  float* scratch;  // [attention_scratch(D)]
};
constexpr int64_t attention_scratch(int64_t D) {
  return (2 * D + kAttentionKeys) * kAttentionLanes;
}
using AttentionFn = void(const AttentionTile&);
AttentionFn attention_portable, attention_avx2, attention_avx512vnni;

// rms_norm: y = x / sqrt(mean(x²) + eps) · weight; y may be x
struct RmsNorm {
  const float* x;  // [rows, x_stride]
  int64_t x_stride;
  const float* weight;  // [K]
  float eps;
  float* y;  // [rows, y_stride]
  int64_t y_stride, rows, K;
};
using RmsNormFn = void(const RmsNorm&);
RmsNormFn rms_norm_portable, rms_norm_avx2, rms_norm_avx512vnni;

// silu_mul: y = gate / (1 + e^-gate) · up
struct SiluMul {
  const float *gate, *up;  // [rows, stride]
  int64_t stride;
  float* y;  // [rows, y_stride]
  int64_t y_stride, rows, columns;
};
using SiluMulFn = void(const SiluMul&);
SiluMulFn silu_mul_portable, silu_mul_avx2, silu_mul_avx512vnni;

// rope: heads of one token turned in place, x · cos + rotate_half(x) · sin, D even
struct Rope {
  float* x;                // [heads, D]
  const float *cos, *sin;  // [D]
  int64_t heads, D;
};
using RopeFn = void(const Rope&);
RopeFn rope_portable, rope_avx2, rope_avx512vnni;

// add_rows: y = a + b
struct AddRows {
  const float *a, *b;
  float* y;
  int64_t count;
};
using AddRowsFn = void(const AddRows&);
AddRowsFn add_rows_portable, add_rows_avx2, add_rows_avx512vnni;

}  // namespace llmq
