"""Attend by a softmax in float64."""

import numpy as np


def numpy_attention(q, k, v, visible):
    """Return softmax attention to what is visible, [B, T, S]; rows that see nothing are zero."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (x.repeat(q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max()) * visible[:, None]
    return np.einsum("bhts,bshd->bthd", weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300), v)


def seen(tokens, window=None):
    t = np.arange(tokens)
    return ((t <= t[:, None]) & (t > t[:, None] - (window or tokens)))[None]
