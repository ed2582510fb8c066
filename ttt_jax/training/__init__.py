"""Train every parameter by ordinary next-token prediction, through the inner loop."""
