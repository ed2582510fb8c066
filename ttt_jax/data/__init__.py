"""Read datasets of tokens into batches; ``prepare/`` makes such datasets from text. Imports nothing of models."""
