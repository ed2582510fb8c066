"""Check trip counts of loops in shortened programs of the TPU compiler."""

import pytest

from ttt_jax.planning import hlo
from ttt_jax.planning.constants import Constants
from ttt_jax.planning.loops import trip_count

LOOP = """\
%wrapped (q: s32[], q.2: s32[]) -> pred[] {
  %q = s32[]{:T(128)} parameter(0)
  %q.2 = s32[]{:T(128)} parameter(1)
  ROOT %less = pred[]{:T(512)} compare(%q, %q.2), direction=LT
}

%added (r: s32[]) -> s32[] {
  %r = s32[]{:T(128)} parameter(0)
  %by = s32[]{:T(128)} constant(1)
  ROOT %sum = s32[]{:T(128)} add(%r, %by)
}

%condition (p: (f32[8], s32[], s32[])) -> pred[] {
  %p = (f32[8]{0:T(128)}, s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=1
  %limit = s32[]{:T(128)} constant(8)
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (s: (f32[8], s32[], s32[])) -> (f32[8], s32[], s32[]) {
  %s = (f32[8]{0:T(128)}, s32[]{:T(128)}, s32[]{:T(128)}) parameter(0)
  %x = f32[8]{0:T(128)} get-tuple-element(%s), index=0
  %i.2 = s32[]{:T(128)} get-tuple-element(%s), index=1
  %carried = s32[]{:T(128)} get-tuple-element(%s), index=2
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)S(6)} add(%i.2, %one)
  ROOT %t = (f32[8]{0:T(128)}, s32[]{:T(128)}, s32[]{:T(128)}) tuple(%x, %next, %carried)
}

ENTRY %main (a: f32[8], b: s32[]) -> f32[8] {
  %a = f32[8]{0:T(128)} parameter(0)
  %b = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %two = s32[]{:T(128)} constant(2)
  %moved = s32[]{:T(128)S(6)} copy(%zero)
  %begin = (f32[8]{0:T(128)}, s32[]{:T(128)}, s32[]{:T(128)}) tuple(%a, %moved, %two)
  %while = (f32[8]{0:T(128)}, s32[]{:T(128)}, s32[]{:T(128)}) while(%begin), condition=%condition, body=%body
  ROOT %r = f32[8]{0:T(128)} get-tuple-element(%while), index=0
}
"""


@pytest.mark.parametrize(
    ("old", "new", "trips"),
    [
        ("", "", 8),
        ("add(%i.2, %one)", "add(%two.2, %i.2)\n  %two.2 = s32[]{:T(128)} constant(2)", 4),
        ("add(%i.2, %one)", "add(%i.2, %carried)", 4),  # a constant that goes through the loop
        ("add(%i.2, %one)", "add(%i.2, %three)\n  %three = s32[]{:T(128)} constant(3)", 3),
        ("add(%i.2, %one)", "fusion(%i.2), kind=kLoop, calls=%added", 8),
        ("copy(%zero)", "copy(%two)", 6),
        ("s32[]{:T(128)} constant(0)", "s32[]{:T(128)} constant(-1)", 9),
        ("constant(8)", "constant(0)", 0),
        ("compare(%i, %limit), direction=LT", "fusion(%i, %limit), kind=kLoop, calls=%wrapped", 8),
        ("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}', 5),
        ("copy(%zero)", "copy(%b)", None),
        ("add(%i.2, %one)", "multiply(%i.2, %one)", None),
        ("add(%i.2, %one)", "add(%i.2, %i.2)", None),
        ("direction=LT", "direction=NE", None),
        ("constant(8)", "negate(%i)", None),
    ],
)
def test_trip_counts(old, new, trips):
    assert old in LOOP
    computations, entry = hlo.parse(LOOP.replace(old, new) if old else LOOP)
    (loop,) = (i for i in computations[entry] if i.opcode == "while")
    assert trip_count(loop, entry, Constants(computations)) == trips
