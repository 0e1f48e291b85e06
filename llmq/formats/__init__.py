"""Encode and decode one weight tensor; plain PyTorch; what every kernel is tested against."""
