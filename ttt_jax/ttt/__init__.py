"""Compute the inner loop: pure functions on arrays, to be read beside the paper.

The paper is Sun et al., "Learning to (Learn at Test Time): RNNs with Expressive Hidden States", arXiv 2407.04620; the
sections and numbers below are those of the arXiv version. Tokens are rows here, so a weight matrix W acts as ``x W``.

    in the paper                                                    where         code
    z_t = f(q_t; W_t)                                               2.3, (5)      primal.run
    loss(W; k, v) = 1/2 || f(k; W) - v ||^2                         2.3, (4)      objective.squared_error
    online step: W_t = W_{t-1} - eta grad loss(W_{t-1}; t)          2.1, (2)      primal.run, with b = 1
    mini-batch step: W_t = W_0 - sum_{s <= t} eta grad loss(W_0; s)
                                                                    2.4, (6)      primal.run
    dual form: Z = Q W_0 - eta tril(Q K^T) G,                       2.5           dual.mini_batch
      W_b = W_0 - eta K^T G, with G = grad of the losses at K W_0                 dual.gradient, update.step
    linear attention is an inner loop: Theorem 1                    2.6           tests/ttt/test_thesis.py
    softmax attention is a Nadaraya-Watson estimator: Theorem 2     2.6           nadaraya_watson
    f(x) = x + LN(f_res(x))                                         2.7           learners.ResidualNorm
    f_res of TTT-Linear and of TTT-MLP                              2.7           learners.Linear, learners.MLP
    W_0 is trained by the outer loop                                2.7           inner_loop.Parameters
    eta(x) = eta_base sigmoid(theta_lr x)                           2.7           rate.Rate

Where the code says more than the paper's text, it follows the authors' code: the factor 1/2 of the loss, biases, which
are weights like W and learn, and rates that are divided by the width d and by the position t in the mini-batch.

Read :mod:`~ttt_jax.ttt.inner_loop` first: the five choices of an inner loop, and its arrays. Then
:mod:`~ttt_jax.ttt.primal`, the definition, :mod:`~ttt_jax.ttt.dual`, one mini-batch as a handful of matmuls, and
:mod:`~ttt_jax.ttt.scan`, a whole sequence. The choices are in :mod:`~ttt_jax.ttt.learner` and
:mod:`~ttt_jax.ttt.learners`, :mod:`~ttt_jax.ttt.objective`, :mod:`~ttt_jax.ttt.rate` and :mod:`~ttt_jax.ttt.update`.
"""
