"""What the commands of `llmq` run."""
