"""Return the message of an error that a call must raise."""

from collections.abc import Callable

import pytest


def error_of(kind: type[Exception], call: Callable, *arguments, **options) -> str:
    """Return the message of the error, which must be one line, with which a call fails."""
    with pytest.raises(kind) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message
