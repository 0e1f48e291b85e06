// attention (attention.h) and the rows between linear layers (decoder_rows.h) with plain C++, a
// float at a time: right, not fast.
//
// Reached on one EPYC Genoa core, whose float32 peak is 118 GOPS: attention over 512 keys of 64
// floats 416 us for 32 queries, 10 GOPS, and 52 us for 3; rms_norm of 576 0.55 us, silu_mul of 1536
// 8.2, rope of 9 heads 0.2, add_rows of 576 0.08.
#include "attention.h"
#include "decoder_rows.h"

#if defined(__AVX__)
#error "portable kernels must run on any x86-64: build this file without -mavx… or -march=native"
#endif

namespace llmq {

void attention_portable(const AttentionTile& c) { attend(c); }
void rms_norm_portable(const RmsNorm& c) { rms_norm_rows(c); }
void silu_mul_portable(const SiluMul& c) { silu_mul_rows(c); }
void rope_portable(const Rope& c) { rope_rows(c); }
void add_rows_portable(const AddRows& c) { add_all(c); }

}  // namespace llmq
