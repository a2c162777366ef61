"""Kernels: arrays in, arrays out, jax alone."""
