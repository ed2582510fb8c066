"""What can be wrong with data."""


class DataError(Exception):
    """Data that cannot be used, or a place that cannot be read or written: one line that names file and offset."""
