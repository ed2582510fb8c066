"""Build language models of blocks of mixers, and count their operations and parameters."""
