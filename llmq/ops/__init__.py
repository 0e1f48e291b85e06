"""The ops of `torch.ops.llmq`; to import this package defines them all."""

from llmq.ops import decoder, dense, native, sparse

__all__ = ["decoder", "dense", "native", "sparse"]
