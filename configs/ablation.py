"""Go from linear attention to TTT-Linear, a rung at a time: Table 1 of "Learning to (Learn at Test Time)".

    ttt train --config configs/ablation.py:mini_batch --workdir gs://bucket/ablation/mini_batch \
        --config.data.source=gs://bucket/pile
    ttt sweep --config configs/ablation.py:linear_attention --config configs/ablation.py:equivalence ... \
        --workdir gs://bucket/ablation --config.data.source=gs://bucket/pile      # all rungs; docs/recipes.md

125M parameters at 2k tokens of the Pile, 4,800 steps, 2.5 B tokens, 256 chips of TPU v5e: 4 to 6 GiB a chip and two to
four minutes each, by ``ttt plan``. Each RUNG with its change to the rung above, and the perplexity in the paper:

    linear_attention                                                  15.23
    equivalence        model.mixer=ttt_linear                         15.23    the same numbers, to rounding (Theorem 1)
    learned_w0         model.ttt.learned_w0=true                      15.27
    norm_residual      model.ttt.output=residual_norm, .bias=true     14.05
    mini_batch         model.ttt.mini_batch=16                        12.35    from the whole sequence, 2048
    learned_eta        model.ttt.learned_eta=true                     11.99
    mamba_backbone     model.ttt.backbone=mamba                       11.09    which is paper.py:ttt_linear-125m-pile-2k

The paper does not give all details. Here, biases of the learner are added with LN and residual (with biases, linear
attention has no counterpart), and a rate that is not learned keeps its initial value. RUNG:smoke is a tiny run on the
embedded corpus.
"""

from ttt_jax.config import ConfigError

from . import paper

RUNGS = (
    "linear_attention",
    "equivalence",
    "learned_w0",
    "norm_residual",
    "mini_batch",
    "learned_eta",
    "mamba_backbone",
)


def get_config(arg: str = "mamba_backbone"):
    rung, _, variant = arg.partition(":")
    if rung not in RUNGS or variant not in ("", "smoke"):
        raise ConfigError(f"ablation.py:{arg}: expected one of {', '.join(RUNGS)}, and :smoke or nothing after it")
    c = paper.get_config("ttt_linear-125m-pile-2k")
    missing = RUNGS[RUNGS.index(rung) + 1 :]
    if "mamba_backbone" in missing:
        c.model.ttt.backbone = "transformer"
    if "learned_eta" in missing:
        c.model.ttt.learned_eta = False
    if "mini_batch" in missing:
        c.model.ttt.mini_batch = c.data.sequence_length
    if "norm_residual" in missing:
        c.model.ttt.output, c.model.ttt.bias = "none", False
    if "learned_w0" in missing:
        c.model.ttt.learned_w0 = False
    if "equivalence" in missing:
        c.model.mixer = "linear_attention"
    return paper.smoke(c) if variant else c
