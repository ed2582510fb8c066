"""Read long contexts of real books: a small TTT-Linear that trains on two CPU cores in 8 minutes.

    ttt tokenize --train books/train.jsonl.zst --validation books/validation.jsonl.zst --test books/test.jsonl.zst \
        --tokenizer byte --output data/books-byte
    ttt train --config configs/books.py:ttt_linear --workdir runs/books-ttt_linear      # or ttt_mlp, attention
    ttt eval --workdir runs/books-ttt_linear --context 32768 --by-document
    ttt plot loss-by-position runs/books-* --context 32768 --by-document --output books.png

Hardware: two CPU cores, 1.1 GiB (ttt_mlp 1.5, attention 7.9) beside the libraries; 250 steps, 4.1 M tokens.
The loss is 1.64 nats per byte over the first 32768 bytes of nine validation books (docs/data.md). On a CPU, TTT-MLP
takes longer, and attention much longer.

For tokens of a BPE that is trained on the train split, use `--train-bpe 8192 --output data/books-bpe` in the first
command and configs/books.py:ttt_linear,bpe in the second.

The data may be any text: see docs/data.md. On an accelerator, train a larger model on longer windows:

    ttt train --config configs/books.py:ttt_linear --workdir runs/large --config.data.sequence_length=32768 \
        --config.model.width=768 --config.model.num_layers=12 --config.model.num_heads=12 \
        --config.model.mlp_width=2048 --config.model.dtype=bfloat16 --config.optimizer.peak_lr=1e-3
"""

from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError
from ttt_jax.mixers import MIXERS

_VOCAB_SIZES = {"byte": 258, "bpe": 8192}


def get_config(arg: str = "ttt_linear"):
    """Return the config for a sequence mixer, optionally followed by byte (the default) or bpe: ``ttt_mlp,bpe``."""
    mixer, _, tokens = arg.partition(",")
    tokens = tokens or "byte"
    if mixer not in MIXERS or tokens not in _VOCAB_SIZES:
        raise ConfigError(f"books.py:{arg}: expected one of {', '.join(MIXERS)}, then nothing, ',byte' or ',bpe'")
    config = config_lib.default()
    config.model.mixer = mixer
    config.model.vocab_size = _VOCAB_SIZES[tokens]
    config.model.width = 128
    config.model.num_layers = 2
    config.model.num_heads = 4
    config.model.mlp_width = 384
    config.data.source = f"data/books-{tokens}"
    config.data.sequence_length = 8192
    config.data.batch_size = 2
    config.optimizer.peak_lr = 4e-3
    config.training.duration = "250 steps"
    return config
