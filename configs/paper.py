"""Train the language models of "Learning to (Learn at Test Time)", arXiv 2407.04620, by its recipe (sec. 3, app. C).

    ttt plan --config configs/paper.py:ttt_linear-125m-pile-2k --topology v5e:16x16
    ttt train --config configs/paper.py:ttt_linear-125m-pile-2k --workdir gs://bucket/runs/ttt_linear-125m-pile-2k \
        --config.data.source=gs://bucket/pile
    ttt train --config configs/paper.py:ttt_linear-125m-pile-2k:smoke --workdir runs/smoke     # seconds, on a CPU

ARG is MIXER-SIZE-DATASET-CONTEXT:

* ttt_linear, ttt_mlp: TTT layers in the Mamba backbone, (M) in the paper; ttt_linear_t, ttt_mlp_t: in the Transformer
  backbone, (T). transformer: the baseline. transformer_finetune: trains the one of 2k further, with 20 % more tokens,
  at 4k or more; ``training.start_from`` is the run at 2k.
* 125m, 350m, 760m, 1.3b
* pile or books: ``data.source`` is data/pile or data/books, tokenized by the tokenizer of Llama, 32,000 tokens
* 1k, 2k, 4k, 8k, 16k, 32k

The suffix :smoke makes any of them tiny, on the embedded corpus.

Hardware: 256 chips of TPU v5e (16x16). The 125m uses 128 chips (8x16) at 16k and 64 (8x8) at 32k, because its 12 heads
split a row in 4 parts at most. A batch has half a million tokens, whatever the context. For TTT-Linear, ``ttt plan``
expects this memory of a chip (of 15.75 GiB) and time; other mixers are in docs/recipes.md.

            steps   tokens    at 2k                at 32k
    125m    4,800    2.5 B     3.9 GiB, 2 min      2.1 GiB, 9 min (64 chips)
    350m   13,500      7 B     6.3 GiB, 15 min     3.0 GiB, 33 min
    760m   29,000     15 B     1.4 GiB, 1.3 h      4.7 GiB, 2.0 h
    1.3b   50,000     26 B     2.3 GiB, 4.0 h      6.6 GiB, 5.4 h

The paper reports perplexity 11.09 for ttt_linear-125m-pile-2k, and 0.27 s a step for ttt_linear-1.3b at 2k, 0.30 s for
the transformer; its other results are in figures.
"""

from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError

MIXERS = {  # model.mixer, model.ttt.backbone
    "ttt_linear": ("ttt_linear", "mamba"),
    "ttt_linear_t": ("ttt_linear", "transformer"),
    "ttt_mlp": ("ttt_mlp", "mamba"),
    "ttt_mlp_t": ("ttt_mlp", "transformer"),
    "transformer": ("attention", None),
    "transformer_finetune": ("attention", None),
}
SIZES = {  # blocks, width, heads, feed-forward width, steps, peak learning rate
    "125m": (12, 768, 12, 2048, 4_800, 3e-3),
    "350m": (24, 1024, 16, 2736, 13_500, 1.5e-3),
    "760m": (24, 1536, 16, 4096, 29_000, 1.25e-3),
    "1.3b": (24, 2048, 32, 5504, 50_000, 1e-3),
}
DATASETS = ("pile", "books")
CONTEXTS = {f"{k}k": k * 1024 for k in (1, 2, 4, 8, 16, 32)}
BATCH = 512 * 1024  # tokens
LONG_ROPE_THETA = 500_000.0  # for the Transformer on Books from 4k on, after Llama Long; 10,000 is worse there
CHIPS = 256


def get_config(arg: str = "ttt_linear-125m-pile-2k"):
    recipe, _, variant = arg.partition(":")
    mixer, size, dataset, context = _parsed(recipe, variant)
    c = config_lib.default()

    # ---- Model
    c.model.mixer, backbone = MIXERS[mixer]
    if backbone:
        c.model.ttt.backbone = backbone
    c.model.num_layers, c.model.width, c.model.num_heads, c.model.mlp_width, steps, peak_lr = SIZES[size]
    c.model.vocab_size = 32_000
    c.model.dtype = "bfloat16"
    if c.model.mixer == "attention" and dataset == "books" and CONTEXTS[context] >= 4096:
        c.model.rope_theta = LONG_ROPE_THETA

    # ---- Data: half a million tokens per batch
    c.data.source = f"data/{dataset}"
    c.data.sequence_length = CONTEXTS[context]
    c.data.batch_size = BATCH // CONTEXTS[context]

    # ---- Optimizer, beside the defaults: AdamW (0.9, 0.95), weight decay 0.1, clip 1.0, cosine to 1e-5
    c.optimizer.peak_lr = peak_lr
    c.optimizer.warmup = "10%"
    c.training.duration = f"{steps} steps"
    if mixer == "transformer_finetune":
        c.model.rope_theta = LONG_ROPE_THETA
        c.optimizer.peak_lr = 1e-4 if size == "125m" else 1e-5  # the best of three in the paper
        c.training.duration = f"{steps // 5} steps"
        c.training.start_from = f"runs/transformer-{size}-{dataset}-2k"

    # ---- Chips. Plans for other meshes are in docs/benchmarks.md.
    split(c, c.model.num_heads)
    c.model.remat = "none" if CONTEXTS[context] <= 2048 and size in ("125m", "350m") else "block"
    return smoke(c) if variant else c


def split(c, heads):
    """Split rows and parameters over the chips; ``heads`` is the number of heads that chips may share.

    A batch of long rows has few of them; then chips share a row, each with some of the heads. Parameters are split in
    16 parts, one line of chips, by fsdp where rows are short and by tensor where they are long; those of the 125m fit
    on one chip.
    """
    c.mesh.tensor = min(max(1, CHIPS // c.data.batch_size), heads & -heads)  # a power of two that divides the heads
    c.mesh.fsdp = 1 if c.model.width == SIZES["125m"][1] else 16 // c.mesh.tensor


def smoke(c):
    """Return the same recipe at a size that a CPU trains in seconds, on the embedded corpus."""
    whole_sequence = c.model.ttt.mini_batch == c.data.sequence_length  # one step of batch gradient descent
    c.model.update(num_layers=2, width=32, num_heads=2, mlp_width=64, vocab_size=258, dtype="float32", remat="none")
    c.data.update(source="embedded", sequence_length=64, batch_size=8)
    if whole_sequence:
        c.model.ttt.mini_batch = c.data.sequence_length
    c.mesh.update(data=-1, fsdp=1, tensor=1)
    c.optimizer.peak_lr = 1e-2
    c.training.update(duration="10 steps", start_from="")
    c.checkpoint.every = "50%"
    return c


def _parsed(recipe, variant):
    parts = recipe.replace("_m-", "-", 1).split("-")
    known = (tuple(MIXERS), tuple(SIZES), DATASETS, tuple(CONTEXTS))
    if len(parts) != 4 or any(part not in names for part, names in zip(parts, known, strict=True)):
        listed = "; ".join(", ".join(names) for names in known)
        raise ConfigError(f"paper.py:{recipe}: expected MIXER-SIZE-DATASET-CONTEXT, one each of {listed}")
    if variant not in ("", "smoke"):
        raise ConfigError(f"paper.py:{recipe}:{variant}: expected :smoke, or nothing, after the recipe")
    if parts[0] == "transformer_finetune" and CONTEXTS[parts[3]] < 4096:
        raise ConfigError(f"paper.py:{recipe}: continues from a model of 2k; expected a context of 4k, 8k, 16k or 32k")
    return parts
