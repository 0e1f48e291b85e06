// attention and the rows between linear layers with plain C++: attention.h and decoder_rows.h.
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
