"""What is written to disk: checkpoints, and the state of interrupted work."""
