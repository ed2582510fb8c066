"""Measure what a trained model knows: loss by token index, its inner loop, and what it remembers."""
