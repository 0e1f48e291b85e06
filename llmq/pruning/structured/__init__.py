"""Removes attention heads and MLP channels, so that the matrices themselves shrink."""
