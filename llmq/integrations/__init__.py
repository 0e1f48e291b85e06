"""What llmq knows of other libraries' models; none of them needs to be installed."""
