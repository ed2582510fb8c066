"""Text to batches. Knows nothing of models."""
