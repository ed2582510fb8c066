"""Turn files of text into datasets of tokens."""
