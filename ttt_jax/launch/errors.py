"""What goes wrong elsewhere."""


class LaunchError(Exception):
    """The machines or the tools that reach them failed: one line that says what, where, and what still exists."""
