// attention (attention.h) and the rows between linear layers (decoder_rows.h) with AVX2.
//
// Reached on one EPYC Genoa core, whose float32 peak is 118 GOPS: attention over 512 keys of 64
// floats 46 us for 32 queries, 91 GOPS, and 9.3 us for 3, 28 GB/s of keys and values; rms_norm of
// 576 0.12 us, silu_mul of 1536 0.69, rope of 9 heads 0.07, add_rows of 576 0.06.
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
