"""Synthetic tasks that small models learn on two CPU cores, to probe what they remember (docs/probes.md).

    ttt train --config configs/tasks.py:associative_recall,ttt_linear --workdir runs/recall
    ttt probe task --workdir runs/recall --items 2,4,8 --context 64,128,256

ARG is a task, associative_recall (4 pairs in 64 tokens) or selective_copying (4 symbols in 32 tokens), and after a
comma the mixer: ttt_linear (the default), ttt_mlp or attention. No files: sequences are drawn anew for every step.

Hardware: two CPU cores, 500 steps, one to four minutes of CPU time. Accuracy on sequences that were never seen, at the
loss of the last steps: associative_recall 1.00 at 0.01 nats (attention 1.00 at 0.00), selective_copying 0.99 at 0.08
(ttt_mlp 0.99 at 0.05, attention 0.99 at 0.03). Recall with ttt_mlp takes more than that: 0.31 at 1.33.
"""

from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError

_TASKS = {"associative_recall": ("associative_recall:4", 64), "selective_copying": ("selective_copying:4", 32)}
_MIXERS = ("ttt_linear", "ttt_mlp", "attention")
_BASE_LR = {"ttt_linear": 10.0, "ttt_mlp": 1.0}  # ten times the paper's: a sequence has a few mini-batches only


def get_config(arg: str = "associative_recall"):
    """The argument is a task, and after a comma the mixer."""
    task, _, mixer = arg.partition(",")
    mixer = mixer or "ttt_linear"
    if task not in _TASKS or mixer not in _MIXERS:
        raise ConfigError(
            f"tasks.py:{arg}: expected {' or '.join(_TASKS)}, then nothing or ,MIXER, one of {', '.join(_MIXERS)}"
        )
    c = config_lib.default()
    c.model.mixer = mixer
    c.model.vocab_size = 32
    c.model.width = 64
    c.model.num_layers = 2
    c.model.num_heads = 2
    c.model.mlp_width = 128
    c.model.init_stddev = 0.1
    c.model.pre_conv = True  # as TTT layers have it here; without, attention takes very many steps to begin
    if mixer in _BASE_LR:
        c.model.ttt.base_lr = _BASE_LR[mixer]
    c.data.source, c.data.sequence_length = _TASKS[task]
    c.data.batch_size = 64
    c.optimizer.peak_lr = 1e-2
    c.optimizer.weight_decay = 0.01
    c.training.duration = "500 steps"
    c.log.every = "10 steps"
    return c
