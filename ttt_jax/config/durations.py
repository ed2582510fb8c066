"""Convert durations to steps: ``"300"`` or ``"300 steps"``, ``"2.5e9 tokens"`` (also ``k``, ``M``, ``B``).

Every duration but that of the run itself may also be a part of the run, such as ``"10%"``. A key that is empty by
default may be empty.
"""

import math
import re

import ml_collections

from ttt_jax import settings
from ttt_jax.config.sections import SECTIONS
from ttt_jax.errors import ConfigError
from ttt_jax.settings import Duration

_DEFAULTS: dict[str, str] = {
    f"{name}.{each.name}": each.default
    for name, section in SECTIONS.items()
    for each in settings.settings_of(section.settings)
    if each.kind is Duration
}
_MOST = 1e18  # steps or tokens; larger numbers are typing errors, and would overflow


def check(config: ml_collections.ConfigDict) -> None:
    """Raise :class:`ConfigError` for texts that are no durations, and for a warm-up as long as the run."""
    for key in _DEFAULTS:
        steps(config, key)
    if steps(config, "optimizer.warmup") >= steps(config, "training.duration") > 1:
        raise ConfigError(
            f"optimizer.warmup={config.optimizer.warmup!r}: expected less than "
            f"training.duration={config.training.duration!r}"
        )


def steps(config: ml_collections.ConfigDict, key: str) -> int:
    """Return the duration of a key in optimizer steps: at least 1, and 0 where it is empty.

    Raises:
      ConfigError: where the text is no duration.
    """
    text = str(settings.value_of(config, key)).strip()
    if not text and not _DEFAULTS[key]:
        return 0
    match = re.fullmatch(r"([0-9.]+(?:e\+?[0-9]+)?)\s*([kMB]?)\s*(|%|steps?|tokens?)", text)
    try:
        amount = float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9}[match[2]] if match else math.nan
    except ValueError:
        amount = math.nan
    unit = match[3] if match else ""
    of_run = key == "training.duration"
    if not amount > 0 or not math.isfinite(amount) or (unit == "%" and (of_run or amount > 100)):
        examples = '"300 steps" or "2.5e9 tokens"' if of_run else '"300 steps", "2.5e9 tokens", or "10%" of the run'
        raise ConfigError(f"{key}={text!r}: expected a duration such as {examples}")
    if unit != "%" and amount > _MOST:
        raise ConfigError(f"{key}={text!r}: expected a duration of at most {_MOST:.0e} steps or tokens")
    if unit == "%":
        return max(1, round(steps(config, "training.duration") * amount / 100))
    if unit.startswith("token"):
        amount /= config.data.batch_size * config.data.sequence_length
    return max(1, round(amount))
