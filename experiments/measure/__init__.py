"""Measurements of engines, kernels and policies, each a command."""
