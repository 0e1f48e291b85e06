// Registers the native implementations; schemas live in llmq/ops.
#include "cpu/ops.h"

#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"

namespace llmq {

std::string cpu_isa() { return isa_name(current_isa()); }
void set_cpu_isa(std::string isa) { set_current_isa(isa.c_str()); }

}  // namespace llmq

STABLE_TORCH_LIBRARY_IMPL(llmq, CPU, library) {
  library.impl("quantize_activation", TORCH_BOX(&llmq::quantize_activation));
  library.impl("int8_linear", TORCH_BOX(&llmq::int8_linear));
  library.impl("weight_only_linear", TORCH_BOX(&llmq::weight_only_linear));
  library.impl("codebook_linear", TORCH_BOX(&llmq::codebook_linear));
  library.impl("bitmap_sparse_linear", TORCH_BOX(&llmq::bitmap_sparse_linear));
  library.impl("decoder_layer", TORCH_BOX(&llmq::decoder_layer));
  library.impl("pack_panels", TORCH_BOX(&llmq::pack_panels));
  library.impl("unpack_panels", TORCH_BOX(&llmq::unpack_panels));
  library.impl("pack_bitmap_panels", TORCH_BOX(&llmq::pack_bitmap_panels));
  library.impl("unpack_bitmap_panels", TORCH_BOX(&llmq::unpack_bitmap_panels));
}

// These two take no tensor, so no device key would ever reach them.
STABLE_TORCH_LIBRARY_IMPL(llmq, CompositeExplicitAutograd, library) {
  library.impl("cpu_isa", TORCH_BOX(&llmq::cpu_isa));
  library.impl("set_cpu_isa", TORCH_BOX(&llmq::set_cpu_isa));
}

#ifdef LLMQ_CUDA
#include "cuda/ops.h"

STABLE_TORCH_LIBRARY_IMPL(llmq, CUDA, library) { llmq::cuda::register_ops(library); }
#endif
