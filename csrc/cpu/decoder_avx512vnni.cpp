// attention and the rows between linear layers with AVX-512: attention.h and decoder_rows.h.
#include "attention.h"
#include "decoder_rows.h"

#if !defined(__AVX512F__)
#error "setup.py gives this file its instruction set by its name: _avx512vnni"
#endif

namespace llmq {

void attention_avx512vnni(const AttentionTile& c) { attend(c); }
void rms_norm_avx512vnni(const RmsNorm& c) { rms_norm_rows(c); }
void silu_mul_avx512vnni(const SiluMul& c) { silu_mul_rows(c); }
void rope_avx512vnni(const Rope& c) { rope_rows(c); }
void add_rows_avx512vnni(const AddRows& c) { add_all(c); }

}  // namespace llmq
