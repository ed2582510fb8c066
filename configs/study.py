"""Compare three mixers at equal tokens and FLOPs on real books: the study of docs/results.md.

    ttt tokenize --train books/train.jsonl.zst --validation books/validation.jsonl.zst --test books/test.jsonl.zst \
        --tokenizer byte --output data/books-byte
    ttt train --config configs/study.py:ttt_linear --workdir runs/study/ttt_linear      # or ttt_mlp, attention

Bytes, windows of 2048, width 128; 480 steps of 8 windows, 7.9 M tokens. A token takes 1.9 million FLOPs forward in each
of the three (within 0.3 %). To that end the numbers of blocks and the feed-forward widths differ, as in the paper.

Hardware: two CPU cores, 20 minutes for ttt_linear, longer for the others; the losses are in docs/results.md.
"""

from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError

_SHAPES = {"ttt_linear": (4, 384), "ttt_mlp": (3, 272), "attention": (2, 344)}  # blocks, feed-forward width


def get_config(mixer: str = "ttt_linear"):
    """Return the config for a mixer: ttt_linear (the default), ttt_mlp or attention."""
    if mixer not in _SHAPES:
        raise ConfigError(f"study.py:{mixer}: expected one of {', '.join(_SHAPES)}")
    c = config_lib.default()
    c.model.mixer = mixer
    c.model.vocab_size = 258
    c.model.width = 128
    c.model.num_heads = 4
    c.model.num_layers, c.model.mlp_width = _SHAPES[mixer]
    c.data.source = "data/books-byte"
    c.data.sequence_length = 2048
    c.data.batch_size = 8
    c.optimizer.peak_lr = 4e-3
    c.training.duration = "480 steps"
    return c
