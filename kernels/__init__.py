"""Triton kernels of the MoE layer, one file a topic."""
