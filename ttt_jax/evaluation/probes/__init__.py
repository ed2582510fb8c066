"""Probes of what a model remembers: needles in haystacks of text, and synthetic tasks it was trained on."""
