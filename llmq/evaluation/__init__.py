"""`evaluate` and `compare`: what a model still knows, and what compression changed."""
