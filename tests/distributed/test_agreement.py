"""Check exchanges of a single process; those of two are in tests/training/test_checkpoint_processes.py."""

import pytest

from ttt_jax.distributed.agreement import Exchange, barrier_that_fails_together, describe


class OurError(RuntimeError):
    pass


def test_a_single_process_exchanges_with_itself():
    exchange = Exchange("test", OurError)
    assert exchange("hello") == ["hello"]
    assert exchange.first_problem("") is None
    assert exchange.first_problem("broken") == "broken"
    assert exchange.on_all(lambda: 3) == 3
    assert exchange.on_first(lambda: [1, 2]) == [1, 2]
    barrier_that_fails_together("test")(key="here", timeout_ms=1)


def test_errors_have_the_type_of_the_exchange():
    def fail(error):
        raise error

    exchange = Exchange("test", OurError)
    with pytest.raises(OurError, match=r"^KeyError: 'a'$") as caught:
        exchange.on_all(lambda: fail(KeyError("a")))
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(OurError, match=r"^as it is$"):
        exchange.on_first(lambda: fail(OurError("as it is")))


def test_describe_returns_the_root_cause_in_one_line():
    def fail_twice():
        try:
            raise OSError(28, "No space\nleft")
        except OSError:
            raise ValueError("outer")  # noqa: B904

    with pytest.raises(ValueError) as caught:
        fail_twice()
    assert describe(caught.value) == "OSError: [Errno 28] No space left"
    with_details = "NOT_FOUND: Error reading \"a\": gone [tensorstore_spec='{\"a\": 1}' source locations='x.cc:3']"
    assert describe(ValueError(with_details)) == 'ValueError: NOT_FOUND: Error reading "a": gone'
    assert describe(TimeoutError()) == "TimeoutError"
    long = describe(ValueError("x" * 500 + "the end"))
    assert len(long) == 405
    assert long.startswith("ValueError: xxx")
    assert long.endswith("xxxthe end")
    assert describe(ValueError(f'in "{"p" * 200}"')) == f'ValueError: in "{"p" * 80}..."'
