"""Provide the parts of mixers and blocks: norms, convolution, rotary positions, linear maps, feed-forward."""
