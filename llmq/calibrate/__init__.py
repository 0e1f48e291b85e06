"""Runs calibration data through a model block by block, and gathers what reaches its layers."""
