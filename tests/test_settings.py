"""Check how keys of the config are declared, checked and parsed."""

import dataclasses

import pytest

from ttt_jax import settings
from ttt_jax.errors import ConfigError
from ttt_jax.settings import Duration, setting


@dataclasses.dataclass(frozen=True)
class Section:
    count: int = setting(3, "how many", least=1)
    share: float = setting(0.5, "of all", least=0, below=1, changes_results=False)
    scale: float | None = setting(None, "unset: as it is", above=0, may_change=True)
    gain: float = setting(4.0, "", above=1)
    part: float = setting(0.5, "", above=0, below=1)
    less: float = setting(-2.0, "", below=1)
    color: str = setting("red", "of lines", among=("red", "blue"), changes_results=False, may_change=False)
    on: bool | None = setting(None, "whether")
    every: Duration = setting("10%", "a duration")


FOUND = {each.name: each for each in settings.settings_of(Section)}


def test_fields_of_a_section_are_settings():
    assert [(each.name, each.default, each.kind) for each in settings.settings_of(Section)] == [
        ("count", 3, int),
        ("share", 0.5, float),
        ("scale", None, float),
        ("gain", 4.0, float),
        ("part", 0.5, float),
        ("less", -2.0, float),
        ("color", "red", str),
        ("on", None, bool),
        ("every", "10%", Duration),
    ]
    assert FOUND["scale"].meaning == "unset: as it is"
    assert [each.name for each in FOUND.values() if not each.changes_results] == ["share", "color"]
    assert [each.name for each in FOUND.values() if each.may_change] == ["share", "scale"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", 1),
        ("count", 10**400),
        ("share", 0),
        ("share", 0.99),
        ("scale", None),
        ("scale", 1e-9),
        ("gain", 1.5),
        ("color", "blue"),
        ("on", None),
        ("on", False),
        ("every", "3 steps"),
    ],
)
def test_values_within_bounds_are_accepted(name, value):
    FOUND[name].check(f"a.{name}", value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", 0, "a.count=0: expected 1 or more"),
        ("count", None, "a.count=None: expected an integer"),
        ("count", 2.0, "a.count=2.0: expected an integer"),
        ("count", True, "a.count=True: expected an integer"),
        ("count", "3", "a.count='3': expected an integer"),
        ("share", 1.0, "a.share=1.0: expected a number from 0 to below 1"),
        ("share", float("nan"), "a.share=nan: expected a number from 0 to below 1"),
        ("scale", 0.0, "a.scale=0.0: expected a positive number"),
        ("scale", float("inf"), "a.scale=inf: expected a positive number"),
        ("scale", "1", "a.scale='1': expected a number"),
        ("gain", 1, "a.gain=1: expected a number above 1"),
        ("part", 1, "a.part=1: expected a number above 0 and below 1"),
        ("less", 1, "a.less=1: expected a number below 1"),
        ("color", "green", "a.color='green': expected one of red, blue"),
        ("on", 1, "a.on=1: expected true or false"),
        ("every", 3, 'a.every=3: expected a text such as "300 steps"'),
    ],
)
def test_other_values_are_refused(name, value, message):
    with pytest.raises(ConfigError) as caught:
        FOUND[name].check(f"a.{name}", value)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (int, "-3", -3),
        (int, "0x10", 16),
        (int, "1_000", 1000),
        (float, "1", 1.0),
        (float, "-inf", -float("inf")),
        (bool, "True", True),
        (bool, "f", False),
        (bool, "1", True),
        (str, "", ""),
        (Duration, "10%", "10%"),
    ],
)
def test_texts_are_parsed_by_type(kind, text, value):
    found = settings.parse(f"k={text}", kind, text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("kind", "text", "accepted"),
    [
        (int, "1.5", "an integer"),
        (int, "9" * 5000, "an integer"),
        (int, "", "an integer"),
        (float, "x", "a number"),
        (bool, "yes", "true or false"),
        (int, "1\n2 + 3", "an integer"),
    ],
)
def test_texts_of_another_type_are_refused(kind, text, accepted):
    with pytest.raises(ConfigError) as caught:
        settings.parse(f"k={text}", kind, text)
    assert str(caught.value) == f"k={' '.join(text.split())}: expected {accepted}"


def test_flat_returns_dotted_keys():
    assert settings.flat({"a": 1, "b": {"c": 2, "d": {"e": None}}, "f": {}}) == {"a": 1, "b.c": 2, "b.d.e": None}
