"""Attend by a softmax in float64."""

import numpy as np


def numpy_attention(q, k, v, visible):
    """Return softmax attention to what is visible, [B, T, S]; rows that see nothing are zero."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (x.repeat(q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max()) * visible[:, None]
    return np.einsum("bhts,bshd->bthd", weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300), v)


def numpy_gradients(q, k, v, visible, g):
    """Return the gradients of ``sum(g y)`` for the y of :func:`numpy_attention`, by the chain rule."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    shared = q.shape[2] // k.shape[2]
    keys, values = (x.repeat(shared, axis=2) for x in (k, v))
    scale = 1 / np.sqrt(q.shape[-1])
    powers = np.exp(scale * np.einsum("bthd,bshd->bhts", q, keys)) * visible[:, None]
    p = powers / np.maximum(powers.sum(-1, keepdims=True), 1e-300)
    dp = np.einsum("bthd,bshd->bhts", g, values)
    logits = scale * p * (dp - (p * dp).sum(-1, keepdims=True))
    of_heads = (np.einsum("bhts,bthd->bshd", *pair) for pair in ((logits, q), (p, g)))
    dk, dv = (x.reshape(*k.shape[:3], shared, -1).sum(3) for x in of_heads)
    return np.einsum("bhts,bshd->bthd", logits, keys), dk, dv


def seen(tokens, window=None):
    t = np.arange(tokens)
    return ((t <= t[:, None]) & (t > t[:, None] - (window or tokens)))[None]
