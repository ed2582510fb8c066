"""Refuse the second derivative of a kernel, which has none, by an error that says what to use instead."""

from functools import partial
from typing import Any, TypeVar

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Arrays = TypeVar("Arrays")  # a tree of floating point arrays


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def differentiable_once(x: Arrays, message: str) -> Arrays:
    """Return the arrays as they are; a derivative of their derivative raises an error.

    A kernel must have it around its inputs and around its outputs: its backward pass reads the former and the
    derivative of the latter. Compiled programs do not change.

    Args:
      message: what the error says.

    Raises:
      NotImplementedError: at the second derivative, while it is traced.
    """
    return x


def _forward(x: Arrays, message: str) -> tuple[Arrays, None]:
    return _constant(x, message), None


def _backward(message: str, _: None, gradient: Arrays) -> tuple[Arrays]:
    return (_constant(gradient, message),)


differentiable_once.defvjp(_forward, _backward)


# A primitive, because jax.custom_jvp is gone from the body of a scan once that is differentiated.
_constant_p = Primitive("differentiable_once")
_constant_p.def_impl(lambda x, *, message: x)
_constant_p.def_abstract_eval(lambda x, *, message: x)
mlir.register_lowering(_constant_p, lambda context, x, *, message: [x])


def _constant(x: Arrays, message: str) -> Arrays:
    return jax.tree.map(lambda leaf: _constant_p.bind(leaf, message=message), x)


def _refuse(primals: Any, tangents: Any, *, message: str) -> Any:
    raise NotImplementedError(message)


def _mapped(arguments: Any, axes: Any, *, message: str) -> Any:
    return _constant_p.bind(*arguments, message=message), axes[0]


ad.primitive_jvps[_constant_p] = _refuse
batching.primitive_batchers[_constant_p] = _mapped
