"""Learn synthetic tasks with small models on two CPU cores, to probe what they remember (docs/probes.md).

    ttt train --config configs/tasks.py:associative_recall,ttt_linear --workdir runs/recall
    ttt probe task --workdir runs/recall --items 2,4,8 --context 64,128,256

ARG is a task, associative_recall (4 pairs in 64 tokens) or selective_copying (4 symbols in 32 tokens), and after a
comma the mixer: ttt_linear (the default), ttt_mlp or attention. There are no files: each step draws new sequences.

Hardware: two CPU cores, 500 steps, one to four minutes of CPU time. Accuracy on unseen sequences, at the loss of the
last steps: associative_recall 1.00 at 0.01 nats (attention 1.00 at 0.00), selective_copying 0.99 at 0.08 (ttt_mlp 0.99
at 0.05, attention 0.99 at 0.03). Recall with ttt_mlp takes more steps: 0.31 at 1.33 here.
"""

from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError

_TASKS = {"associative_recall": ("associative_recall:4", 64), "selective_copying": ("selective_copying:4", 32)}
_MIXERS = ("ttt_linear", "ttt_mlp", "attention")
_BASE_LR = {"ttt_linear": 10.0, "ttt_mlp": 1.0}  # ten times the paper's, since a sequence has only a few mini-batches


def get_config(arg: str = "associative_recall"):
    """Return the config for a task, optionally followed by a comma and the mixer."""
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
    c.model.pre_conv = True  # as in the TTT layers; without it, attention takes many steps to begin to learn
    if mixer in _BASE_LR:
        c.model.ttt.base_lr = _BASE_LR[mixer]
    c.data.source, c.data.sequence_length = _TASKS[task]
    c.data.batch_size = 64
    c.optimizer.peak_lr = 1e-2
    c.optimizer.weight_decay = 0.01
    c.training.duration = "500 steps"
    c.log.every = "10 steps"
    return c
