"""What can go wrong with a run."""


class CheckpointError(RuntimeError):
    """Checkpoints that cannot be written or read: one message that names folders and says what to do."""
