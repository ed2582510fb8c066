"""Make configs from overrides of the quickstart, and return the line of an error."""

from pathlib import Path

import refusals

from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
QUICKSTART = CONFIGS / "quickstart.py"
SIZES = (  # whatever the recipe says: the messages below name them
    "model.width=128",
    "model.num_heads=4",
    "data.batch_size=4",
    "data.sequence_length=1024",
    "training.duration=200 steps",
    "optimizer.warmup=10%",
)
GET_CONFIG = "from ttt_jax import config\n\n\ndef get_config(arg=''):\n    c = config.default()\n"  # 5 lines


def parse(*overrides, file=QUICKSTART):
    return config_lib.from_arguments(["--config", str(file), *(f"--config.{text}" for text in (*SIZES, *overrides))])


def error_of(call, *args, **options) -> str:
    """Return the message of the ConfigError with which a call fails."""
    return refusals.error_of(ConfigError, call, *args, **options)
