"""Kernels for tests alone: questions to the GPU that the product's kernel cannot ask by itself."""
