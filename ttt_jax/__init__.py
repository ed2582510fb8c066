"""ttt_jax: language models that learn at test time, trained, evaluated and compared in JAX."""

__version__ = "0.1.0"
