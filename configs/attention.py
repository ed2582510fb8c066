"""Train Transformers whose attention costs less at long contexts: with windows, and with heads that share keys.

    ttt plan --config configs/attention.py:hybrid_gqa-1.3b-pile-32k --topology v5e:8x16
    ttt train --config configs/attention.py:hybrid_gqa-1.3b-pile-32k --workdir gs://bucket/runs/hybrid_gqa \
        --config.data.source=gs://bucket/pile
    ttt train --config configs/attention.py:hybrid_gqa-1.3b-pile-32k:smoke --workdir runs/smoke  # seconds, on a CPU

ARG is MIXER-SIZE-DATASET-CONTEXT, with the sizes, the datasets and everything else of paper.py. MIXER is one of:

* transformer, transformer_finetune: those of paper.py
* sliding: a token sees the last 8192 tokens, itself included
* hybrid: five blocks of sliding, one that sees everything, and so on

sliding and hybrid have contexts of 8k, 16k or 32k. With the suffix _gqa, as in transformer_gqa, all heads of queries
share 4 heads of keys and values (1.3b: 8); transformer_finetune_gqa trains transformer_gqa of 2k further.

The suffix :smoke makes any of them tiny, on the embedded corpus.

Hardware: that of paper.py. Few heads of keys split a row in few parts, so that _gqa takes 128 chips at 16k and 64 at
32k; the 1.3b takes 256 and 128.
"""

from ttt_jax.config import ConfigError

from . import paper

MIXERS = {  # the recipe of paper.py, model.mixer
    "transformer": ("transformer", "attention"),
    "transformer_finetune": ("transformer_finetune", "attention"),
    "sliding": ("transformer", "sliding"),
    "hybrid": ("transformer", "sliding*5 + attention"),
}
SHARED = "_gqa"
KV_HEADS = {"125m": 4, "350m": 4, "760m": 4, "1.3b": 8}
WINDOW = 8192


def get_config(arg: str = "hybrid-125m-pile-32k"):
    recipe, _, variant = arg.partition(":")
    name, *rest = recipe.split("-")
    mixer = name.removesuffix(SHARED)
    if mixer not in MIXERS or variant not in ("", "smoke"):
        raise ConfigError(
            f"attention.py:{arg}: expected MIXER-SIZE-DATASET-CONTEXT, MIXER one of {', '.join(MIXERS)}, with or "
            f"without {SHARED}, and :smoke or nothing after the recipe"
        )
    of_paper, pattern = MIXERS[mixer]
    c = paper.get_config("-".join([of_paper, *rest]))
    c.model.mixer = pattern
    if "sliding" in pattern:
        c.model.attention.window = WINDOW
        if c.data.sequence_length < WINDOW:
            raise ConfigError(f"attention.py:{arg}: the window is longer than the context; expected 8k, 16k or 32k")
    if name.endswith(SHARED):
        c.model.attention.num_kv_heads = KV_HEADS[rest[0]]
        paper.split(c, c.model.attention.num_kv_heads)
        c.training.start_from = c.training.start_from.replace("transformer-", f"transformer{SHARED}-")
    return _smoke(c) if variant else c


def _smoke(c):
    """Return the recipe at the size of paper.py's, with windows, shared heads and each kind of block."""
    c = paper.smoke(c)
    if "sliding" in c.model.mixer:
        c.model.attention.window = c.data.sequence_length // 4
    if c.model.attention.num_kv_heads:
        c.model.attention.num_kv_heads = 1
    if "+" in c.model.mixer:
        c.model.num_layers = 6
    return c
