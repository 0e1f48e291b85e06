"""What llmq knows of architectures: which layers, how their blocks run, what stands in for them."""
