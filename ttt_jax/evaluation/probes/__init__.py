"""Probe what a model remembers: needles in haystacks of text, and the synthetic task it was trained on."""
