"""The language models of the paper's comparison, 125M to 1.3B parameters at contexts of 2k to 32k tokens of the Pile.

    ttt tokenize --train 'pile/train/*.jsonl.zst' --validation pile/val.jsonl.zst --test pile/test.jsonl.zst \
        --tokenizer llama-2/tokenizer.model --output gs://bucket/pile-llama-2
    ttt plan --config configs/pile.py:ttt_linear,1.3b,2k --topology v5e:16x16
    ttt train --config configs/pile.py:ttt_linear,1.3b,2k --workdir gs://bucket/1.3b-2k \
        --config.data.source=gs://bucket/pile-llama-2

ARG is mixer, size and context: ttt_linear, ttt_mlp or attention; 125m, 350m, 760m or 1.3b; 2k, 4k, 8k, 16k or 32k. A
batch has half a million tokens, and the run as many as Chinchilla's recipe asks for: 2.5, 7, 15 and 26 billion.

The mesh is for 256 chips of TPU v5e, 16x16. A batch has fewer rows the longer they are, and then chips share a row,
each with some of the heads: 16 chips a row of 32k tokens. Parameters lie in 16 parts, one line of the chips, by fsdp
where rows are short and by tensor where they are long: more parts send no less, and of 256 the TPU compiler sums the
whole gradients on every chip. The 125m fits on a chip whole; it has 12 heads, which 4 chips can share at most, so that
it trains on 128 chips at 16k (v5e:8x16) and on 64 at 32k (v5e:8x8). A forward pass is kept for the backward pass where
there is room for it, and computed again, block by block, elsewhere. What each of them takes: docs/benchmarks.md.
"""

from ttt_jax import config as config_lib
from ttt_jax.config import MIXERS, ConfigError

SIZES = {  # width, layers, heads, feed-forward width, peak learning rate, duration
    "125m": (768, 12, 12, 2048, 3e-3, "2.5B tokens"),
    "350m": (1024, 24, 16, 2736, 1.5e-3, "7B tokens"),
    "760m": (1536, 24, 16, 4096, 1.25e-3, "15B tokens"),
    "1.3b": (2048, 24, 32, 5504, 1e-3, "26B tokens"),
}
CONTEXTS = {f"{k}k": k * 1024 for k in (2, 4, 8, 16, 32)}
BATCH = 512 * 1024  # tokens


def get_config(arg: str = "ttt_linear"):
    """The argument is a sequence mixer, then a size (125m) and a context (2k): ``ttt_mlp,350m,8k``."""
    mixer, size, context, *more = [*arg.split(","), *("125m", "2k")[arg.count(",") :]]
    if mixer not in MIXERS or size not in SIZES or context not in CONTEXTS or more:
        raise ConfigError(
            f"pile.py:{arg}: expected mixer,size,context: one of {', '.join(MIXERS)}; of {', '.join(SIZES)}; "
            f"of {', '.join(CONTEXTS)}"
        )
    width, layers, heads, mlp_width, peak_lr, duration = SIZES[size]
    c = config_lib.default()
    c.model.mixer = mixer
    c.model.vocab_size = 32000
    c.model.width = width
    c.model.num_layers = layers
    c.model.num_heads = heads
    c.model.mlp_width = mlp_width
    c.model.dtype = "bfloat16"
    c.data.source = "data/pile"
    c.data.sequence_length = CONTEXTS[context]
    c.data.batch_size = BATCH // CONTEXTS[context]
    c.optimizer.peak_lr = peak_lr
    c.training.duration = duration
    c.mesh.tensor = min(256 // c.data.batch_size, heads & -heads)  # chips that share a row, a power of two
    c.mesh.fsdp = 1 if size == "125m" else 16 // c.mesh.tensor
    c.model.remat = "none" if context == "2k" and size in ("125m", "350m") else "block"
    return c
