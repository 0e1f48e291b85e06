// attention and the rows between linear layers with AVX2; attention.h and decoder_rows.h tell how.
#include "attention.h"
#include "decoder_rows.h"

#if !defined(__AVX2__) || !defined(__FMA__)
#error "setup.py gives this file its instruction set by its name: _avx2"
#endif

namespace llmq {

void attention_avx2(const AttentionTile& c) { attend(c); }
void rms_norm_avx2(const RmsNorm& c) { rms_norm_rows(c); }
void silu_mul_avx2(const SiluMul& c) { silu_mul_rows(c); }
void rope_avx2(const Rope& c) { rope_rows(c); }
void add_rows_avx2(const AddRows& c) { add_all(c); }

}  // namespace llmq
