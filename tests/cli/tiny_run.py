"""Run commands in this process, with a config so small that it trains in seconds."""

from pathlib import Path

from ttt_jax import cli

QUICKSTART = str(Path(__file__).resolve().parents[2] / "configs" / "quickstart.py")
TINY = [
    *("--config", f"{QUICKSTART}:attention"),
    *"--config.model.width=8 --config.model.num_heads=2 --config.model.num_layers=1 --config.model.mlp_width=8".split(),
    *"--config.data.sequence_length=32 --config.data.batch_size=2 --config.training.duration=4".split(),
]


def ttt(*arguments) -> int:
    """Run a command and return its exit status."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as end:  # argparse
        return end.code
