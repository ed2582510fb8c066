"""Check how constants of programs lie in memory; loops and kernels test where they are found."""

import pytest

from ttt_jax.planning.constants import literal


@pytest.mark.parametrize(
    ("shape", "values", "words"),
    [
        ("s32[3]{0:T(128)}", "{ 1, -2, 3 }", {0: 1, 1: 2**32 - 2, 2: 3}),
        ("u32[]{:T(128)}", "7", {0: 7}),
        ("pred[2]{0:T(512)(128)(4,1)}", "{ true, false }", {0: 1}),
        ("s8[6]{0:T(512)(128)(4,1)}", "{ 1, 2, 3, 4, 5, 6 }", {0: 1, 1: 2, 2: 3, 3: 4, 4: 5, 5: 6}),
        ("s8[1,2,2]{2,1,0:T(4,128)(4,1)}", "{ /*i0=0*/ { { 1, 2 }, { 3, 4 } } }", {0: 0x301, 1: 0x402}),
        ("s16[2,1]{1,0:T(2,128)(2,1)S(1)}", "{ {1}, {-1} }", {0: 0xFFFF0001}),
        ("s32[2,2]{0,1:T(2,128)}", "{ {1, 2}, {3, 4} }", {0: 1, 1: 3, 128: 2, 129: 4}),
        ("s32[9,1]{1,0:T(8,128)}", "{ {1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}, {9} }",
         {**{128 * i: i + 1 for i in range(9)}}),
        ("s32[2]{0}", "{ 5, 6 }", {0: 5, 1: 6}),
    ],
)  # fmt: skip
def test_constants_in_memory(shape, values, words):
    found = literal(shape, f'{values}), metadata={{op_name="x (1)"}}')
    assert found is not None
    assert {i: word for i, word in enumerate(found) if word} == words


@pytest.mark.parametrize(
    ("shape", "values"), [("f32[2]{0:T(128)}", "{ 1, 2 }"), ("s32[40]{0:T(128)}", "{...}"), ("s4[2]{0}", "{ 1, 2 }")]
)
def test_other_constants(shape, values):
    assert literal(shape, values + ")") is None
