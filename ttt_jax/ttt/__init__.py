"""Compute the inner loop: pure functions on arrays, to be read beside the paper.

The paper is Sun et al., "Learning to (Learn at Test Time): RNNs with Expressive Hidden States", arXiv 2407.04620.
Tokens are rows here, so a weight matrix W acts as ``x W``.

    in the paper                                                    its name          code
    z_t = f(q_t; W_t)                                               output rule       primal.run
    loss(W; k, v) = || f(k; W) - v ||^2                             multi-view task   objective.squared_error
    W_t = W_{t-1} - eta grad loss(W_{t-1}; t)                       update rule       primal.run, with b = 1
    W_t = W_0 - sum_{s <= t} eta grad loss(W_0; s)                  mini-batch TTT    primal.run
    Z = Q W_0 - eta tril(Q K^T) G,                                  dual form         dual.mini_batch
      W_b = W_0 - eta K^T G, with G = grad of the losses at K W_0                     dual.gradient, update.step
    linear attention is an inner loop                               Theorem 1         tests/ttt/test_thesis.py
    a Nadaraya-Watson estimator is softmax attention                Theorem 2         nadaraya_watson
    f(x) = x + LN(f_res(x))                                         stability of f    learners.ResidualNorm
    f_res, linear or an MLP of two layers                           instantiations    learners.Linear, learners.MLP
    W_0 is trained by the outer loop                                learnable W_0     inner_loop.Parameters
    eta(x) = eta_base sigmoid(theta_lr x)                           learnable eta     rate.Rate

Where the code says more than the paper's text, it follows the authors' code: the factor 1/2 of the loss, biases, which
are weights like W and learn, and rates that are divided by the width d and by the position t in the mini-batch.

Read :mod:`~ttt_jax.ttt.inner_loop` first: the five choices of an inner loop, and its arrays. Then
:mod:`~ttt_jax.ttt.primal`, the definition, :mod:`~ttt_jax.ttt.dual`, one mini-batch as a handful of matmuls, and
:mod:`~ttt_jax.ttt.scan`, a whole sequence. The choices are in :mod:`~ttt_jax.ttt.learner` and
:mod:`~ttt_jax.ttt.learners`, :mod:`~ttt_jax.ttt.objective`, :mod:`~ttt_jax.ttt.rate` and :mod:`~ttt_jax.ttt.update`.
"""
