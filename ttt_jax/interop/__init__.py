"""Other people's checkpoints and reference numbers."""
