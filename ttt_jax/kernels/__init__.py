"""Compute the inner loop by fused kernels for TPUs, with the same signature and results as the scan."""
