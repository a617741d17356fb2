"""Tensor functions that a model computes with: attention back ends, our own fused kernels."""
