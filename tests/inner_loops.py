"""Provide inner loops that are neither TTT-Linear nor TTT-MLP, as keys of ``config.model.ttt``."""

POINTS = {
    # LaCT's: a rate for each weight matrix, a gate, and a momentum beside W.
    "lact": {
        **{"learner": "swiglu", "output": "none", "objective": "dot_product", "rate": "softplus"},
        **{"rate_per_matrix": True, "update": "momentum + muon + renormalise", "reading": "previous"},
    },
    # Two gates; inside a mini-batch, a token sees the steps before it.
    "decay": {"update": "decay + momentum"},
}
