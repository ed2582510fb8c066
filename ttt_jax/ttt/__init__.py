"""The inner loop: pure functions on arrays, to be read beside the paper.

* :mod:`~ttt_jax.ttt.learner`: the inner model ``f`` and its self-supervised loss.
* :mod:`~ttt_jax.ttt.dual`: one mini-batch of gradient steps as a handful of matmuls.
* :mod:`~ttt_jax.ttt.primal`: the same token by token, by autodiff.
* :mod:`~ttt_jax.ttt.scan`: a sequence, mini-batch after mini-batch.
"""
