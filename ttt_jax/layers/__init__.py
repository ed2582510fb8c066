"""Flax modules, [B, T, D] to [B, T, D]: one file per sequence mixer, plus the parts they share.

Every mixer has the same face: ``__call__(x, state=None, inner_lr_scale=1.0) -> (y, state)`` and
``initial_state(batch, length)``. Without a state it reads whole sequences from their start, which is training.
With one it reads the next piece and returns the state after it. Position 0 in a state means the start of a sequence.
"""
