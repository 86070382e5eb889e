"""Kernels known to be wrong: the checker is checked with them."""
