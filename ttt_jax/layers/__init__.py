"""Parts that mixers and blocks share: norms, convolution, rotary positions, projections, feed-forward, embedding."""
