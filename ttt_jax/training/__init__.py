"""The outer loop: ordinary next-token training of every parameter, through the inner loop."""
