"""The ops of `torch.ops.llmq`: schema, checks, reference, backward."""
