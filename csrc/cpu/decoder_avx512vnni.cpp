// attention (attention.h) and the rows between linear layers (decoder_rows.h) with AVX-512.
//
// Reached on one EPYC Genoa core, whose float32 peak is 118 GOPS: attention over 512 keys of 64
// floats 42 us for 32 queries, 101 GOPS, and 8.4 us for 3, 31 GB/s of keys and values; rms_norm of
// 576 0.08 us, silu_mul of 1536 0.44, rope of 9 heads 0.07, add_rows of 576 0.05.
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
