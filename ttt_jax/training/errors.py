"""What can go wrong with a run."""


class CheckpointError(RuntimeError):
    """Checkpoints that cannot be written or read: one message that names folders and says what to do."""


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient became infinite or not a number."""
