"""Fused kernels for TPUs behind the face of the scan."""
