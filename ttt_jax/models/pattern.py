"""Read ``model.mixer``, a pattern of mixers that is repeated until the model has all its blocks.

    sliding*5 + attention                               five blocks of one mixer, one of another, and so on
    ttt_linear(mini_batch=32)*3 + attention             with keys of the mixer's section for these blocks alone
    sliding*9 + sliding(channel=swiglu + swiglu)*3      or with keys of :data:`BLOCK_KEYS`

An entry is a name of :data:`ttt_jax.mixers.MIXERS`, in parentheses the keys that differ for its blocks, and the number
of these blocks. Where the number of blocks of the model is not a multiple of the pattern, the last repetition is cut.
"""

import itertools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_collections

from ttt_jax import import_path, settings
from ttt_jax.errors import ConfigError
from ttt_jax.mixers import MIXERS
from ttt_jax.models.stack import NORMS, channel_parts
from ttt_jax.ttt.inner_loop import InnerLoop

BLOCK_KEYS = ("channel", "norms", "pre_conv", "conv_width", "mlp_width", "rope_theta")

_ENTRY = re.compile(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*(?:\*\s*(\d{1,6}))?\s*(\+|$)")
_EXAMPLE = "a pattern of them such as 'sliding*5 + attention'"


class Run(NamedTuple):
    """Blocks of one kind that follow each other."""

    model: ml_collections.ConfigDict  # the section ``model`` for these blocks, with one mixer
    text: str  # the entry of the pattern, without its count
    blocks: int


class Segment(NamedTuple):
    """Runs of blocks, repeated one after the other."""

    runs: tuple[Run, ...]
    repeats: int


def segments(model: ml_collections.ConfigDict) -> tuple[Segment, ...]:
    """Return the stack that ``config.model`` describes: the whole repetitions of the pattern, and the last part.

    Raises:
      ConfigError: for a pattern that cannot be read, that names a mixer or key that does not exist, or that has more
        blocks than the model.
    """
    runs = _merged(_runs(model))
    whole = sum(run.blocks for run in runs)
    if len(runs) == 1:
        return (Segment((runs[0]._replace(blocks=model.num_layers),), 1),)
    if whole > model.num_layers:
        raise ConfigError(
            f"model.num_layers={model.num_layers}: fewer blocks than the {whole} of model.mixer={model.mixer!r}; "
            f"expected {whole} or more"
        )
    repeats, rest = divmod(model.num_layers, whole)
    found = [Segment(tuple(runs), repeats)]
    if rest:
        found.append(Segment(tuple(_first(runs, rest)), 1))
    return tuple(found)


def kinds(model: ml_collections.ConfigDict) -> list[Run]:
    """Return each kind of block once, with the number of its blocks, in order of first appearance."""
    found: dict[str, Run] = {}
    for segment, run in each_run(model):
        count = segment.repeats * run.blocks
        known = found.get(run.text)
        found[run.text] = run._replace(blocks=count + (known.blocks if known else 0))
    return list(found.values())


def each_run(model: ml_collections.ConfigDict) -> Iterator[tuple[Segment, Run]]:
    """Yield every run of every segment, in order."""
    return ((segment, run) for segment in segments(model) for run in segment.runs)


def check(model: ml_collections.ConfigDict) -> None:
    """Raise :class:`ConfigError` where the pattern, or the values for one kind of block, are not valid."""
    for kind in kinds(model):
        try:
            channel_parts(kind.model.channel)
        except ValueError as error:
            raise ConfigError(f"model.channel={kind.model.channel!r}: {error}") from error
        if kind.model.norms not in NORMS:
            raise ConfigError(f"model.norms={kind.model.norms!r}: expected one of {', '.join(NORMS)}")
        MIXERS[kind.model.mixer].check(kind.model)


def describe(model: ml_collections.ConfigDict) -> str:
    """Return the model in words, for labels: the label of its mixer, or ``Hybrid 5 sliding : 1 attention``."""
    runs = _merged(_runs(model))
    if len(runs) == 1:
        return MIXERS[runs[0].model.mixer].label(runs[0].model)
    return "Hybrid " + " : ".join(f"{run.blocks} {run.text}" for run in runs)


def learning_kinds(model: ml_collections.ConfigDict) -> list[Run]:
    """Return the kinds of block whose mixers learn at test time, for which ``config.model.ttt`` has a meaning."""
    return [kind for kind in kinds(model) if MIXERS[kind.model.mixer].learns]


def inner_loop(model: ml_collections.ConfigDict) -> InnerLoop:
    """Return the inner loop of a kind of block from :func:`learning_kinds`."""
    found = MIXERS[model.mixer].inner_loop
    assert found is not None
    return found(model)


def blocks(model: ml_collections.ConfigDict) -> list[Run]:
    """Return, for each block in order, the run that it belongs to."""
    runs = [run for segment in segments(model) for _ in range(segment.repeats) for run in segment.runs]
    return [run for run in runs for _ in range(run.blocks)]


def _runs(model: ml_collections.ConfigDict) -> list[Run]:
    """Return a run for each entry of the pattern ``model.mixer``."""
    runs, place, more = [], 0, True
    text = model.mixer
    while more:
        match = _ENTRY.match(text, place)
        if match is None or match[1] not in MIXERS:
            unknown = f": {match[1]!r}" if match and match[0].strip() != text.strip() else ""
            raise ConfigError(f"model.mixer={text!r}{unknown}: expected one of {', '.join(MIXERS)}, or {_EXAMPLE}")
        name, changes, count, plus = match.groups()
        if count is not None and int(count) < 1:
            raise ConfigError(f"model.mixer={text!r}: {name}*{count}: expected a count of 1 or more")
        entry = f"{name}({', '.join(_assignments(changes))})" if changes else name
        runs.append(Run(_model_of_entry(model, name, changes or ""), entry, int(count or 1)))
        place, more = match.end(), plus == "+" and match[0].strip() != ""
        if more and place >= len(text):
            raise ConfigError(f"model.mixer={text!r}: ends with +; expected {_EXAMPLE}")
    return runs


def _merged(runs: list[Run]) -> list[Run]:
    """Return the runs with adjacent runs of one kind joined."""
    found = []
    for _, group in itertools.groupby(runs, key=lambda run: run.text):
        alike = list(group)
        found.append(alike[0]._replace(blocks=sum(run.blocks for run in alike)))
    return found


def _first(runs: list[Run], blocks: int) -> Iterator[Run]:
    for run in runs:
        if blocks <= 0:
            return
        yield run._replace(blocks=min(run.blocks, blocks))
        blocks -= run.blocks


def _model_of_entry(model: ml_collections.ConfigDict, name: str, changes: str) -> ml_collections.ConfigDict:
    """Return the section ``model`` for the blocks of one entry: with one mixer, and the entry's own values."""
    found = ml_collections.ConfigDict(model.to_dict())
    found.mixer = name
    section, declared, unused = MIXERS[name].section, MIXERS[name].settings, MIXERS[name].unused
    declares = settings.settings_of(declared) if declared else ()
    of_section = {each.name: each for each in declares if each.name not in unused}
    for assignment in _assignments(changes):
        key, _, text = (part.strip() for part in assignment.partition("="))
        where = f"model.mixer={model.mixer!r}: {name}({assignment})"
        each = of_section.get(key)
        if each is not None and not each.may_change:
            value = settings.parse(where, each.kind, text)
            each.accepts.check(f"model.mixer={model.mixer!r}: {name}: {key}", value)
            if each.takes_function and import_path.is_import_path(value):
                raise ConfigError(
                    f"{where}: expected the name of a function of this package; yours is set by model.{section}.{key}"
                )
            found[section][key] = value
        elif key in BLOCK_KEYS:
            found[key] = settings.parse(where, _KINDS.get(key, str), text)
        else:
            known = [each.name for each in of_section.values() if not each.may_change]
            raise ConfigError(f"{where}: unknown key; expected one of {', '.join([*known, *BLOCK_KEYS])}")
    return found


def _assignments(changes: str) -> list[str]:
    return [part.strip() for part in changes.split(",") if part.strip()]


_KINDS: dict[str, Any] = {"pre_conv": bool, "conv_width": int, "mlp_width": int, "rope_theta": float}
