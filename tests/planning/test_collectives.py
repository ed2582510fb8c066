"""Compare collectives in HLO text with counts by hand, for programs compiled for CPUs and text in the form of TPUs."""

import subprocess
import sys
from pathlib import Path

import pytest

from ttt_jax.planning import collectives

PROGRAMS = Path(__file__).with_name("programs.py")


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Return the HLO text of every program of ``programs.py``, compiled for eight CPU devices in a 2 x 4 mesh."""
    folder = tmp_path_factory.mktemp("programs")
    done = subprocess.run([sys.executable, str(PROGRAMS), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.stem: path.read_text() for path in folder.iterdir()}


def counted(text):
    return [(c.kind, c.bytes, c.group, c.times, len(c.loops)) for c in collectives.read(text)]


def test_a_sum_in_a_scan_counts_once_per_turn(programs):
    """Check 64 float32 over 8 devices: 8 each, 32 bytes, summed over 4 devices, 7 times."""
    (sum_,) = collectives.read(programs["scan"])
    assert (sum_.kind, sum_.bytes, sum_.group, sum_.times) == ("all-reduce", 32, 4, 7)
    assert sum_.sent == 2 * 32 * 3 / 4
    assert len(sum_.loops) == 1
    assert sum_.loops[0].endswith("/while")
    assert "while/body" in sum_.op_name
    assert "psum" in sum_.op_name


def test_trip_counts_of_nested_scans_multiply(programs):
    assert counted(programs["nested"]) == [("all-reduce", 32, 2, 15, 2), ("all-reduce", 32, 4, 3, 1)]


def test_every_kind_of_collective_is_counted(programs):
    """Check one collective after the other on 8 float32 per device: gathered over 2 to 64 bytes, scattered back, ..."""
    assert sorted(counted(programs["kinds"])) == [
        ("all-gather", 64, 2, 1, 0),
        ("all-to-all", 32, 4, 1, 0),
        ("collective-permute", 32, 8, 1, 0),
        ("reduce-scatter", 64, 2, 1, 0),
    ]
    sent = {c.kind: c.sent for c in collectives.read(programs["kinds"])}
    assert sent == {"all-gather": 32, "all-to-all": 24, "collective-permute": 32, "reduce-scatter": 32}


def test_a_program_without_collectives(programs):
    assert counted(programs["none"]) == []


TPU = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%sum (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[]{:T(256)} parameter(0)
  ROOT %s = bf16[]{:T(256)} add(%x, %x)
}

%all-reduce-scatter.1 (input: bf16[8,256], other: bf16[4]) -> (bf16[2,256], bf16[1]) {
  %input = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.1 = (bf16[8,256]{1,0:T(8,128)(2,1)}, bf16[4]{0}) all-reduce(%input), channel_id=1, \
replica_groups={{0,1,2,3}}, to_apply=%sum
  ROOT %t = (bf16[2,256]{1,0}, bf16[1]{0}) tuple(%input, %input)
}

%start (p: bf16[8,64]) -> (bf16[8,64], bf16[8,256], u32[]) {
  %g = bf16[8,256]{1,0} all-gather(%p), channel_id=5, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="0"}, \
metadata={op_name="jit(step)/wq"}
}

%goes_on (p: bf16[8,64]) -> bf16[8,256] {
  %g = bf16[8,256]{1,0} all-gather(%p), channel_id=5, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="0"}
}

%condition (p: (s32[], bf16[8,64])) -> pred[] {
  %p = (s32[]{:T(128)}, bf16[8,64]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %limit = s32[]{:T(128)} constant(16)
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (p: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %p = (s32[]{:T(128)}, bf16[8,64]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %f = bf16[8,256]{1,0} fusion(%p), kind=kCustom, calls=%goes_on
  %r = (f32[3]{0}, /*index=1*/u32[]{:S(2)}) all-reduce-start(%f), channel_id=7, \
replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, to_apply=%sum
  %done = f32[3]{0} all-reduce-done(%r)
  ROOT %t = (s32[]{:T(128)}, bf16[8,64]{1,0}) tuple(%next, %f)
}

ENTRY %main (p: bf16[8,64]) -> bf16[8,64] {
  %async-collective-start = (bf16[8,64]{1,0}, bf16[8,256]{1,0}, u32[]{:S(2)}) fusion(%p), kind=kCustom, calls=%start
  %zero = s32[]{:T(128)} constant(0)
  %begin = (s32[]{:T(128)}, bf16[8,64]{1,0}) tuple(%zero, %p)
  %while.1 = (s32[]{:T(128)}, bf16[8,64]{1,0}) while(%begin), condition=%condition, body=%body, \
metadata={op_name="jit(step)/mixer/while"}
  %async-collective-done = bf16[8,256]{1,0} fusion(%while.1), kind=kCustom, calls=%goes_on
  %fusion.9 = (bf16[2,256]{1,0}, bf16[1]{0}) fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1, \
metadata={op_name="jit(step)/dot_general"}
  %permute = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}
  ROOT %permute.1 = f32[8]{0} collective-permute-done(%permute)
}
"""


def test_text_of_tpu_programs():
    """Check the forms of the TPU compiler.

    A chain of fusions is one gather, also where a loop runs beside it; a sum with slices is a reduce-scatter; trip
    counts come from conditions; starts list operands before results.
    """
    found = collectives.read(TPU)
    assert [(c.kind, c.bytes, c.group, c.times, c.op_name) for c in found] == [
        ("all-gather", 8 * 256 * 2, 4, 1, "jit(step)/wq"),
        ("all-reduce", 3 * 4 + 4, 2, 16, "jit(step)/mixer/while"),
        ("reduce-scatter", (8 * 256 + 4) * 2, 4, 1, "jit(step)/dot_general"),
        ("collective-permute", 32, 4, 1, ""),
    ]
    assert [c.loops for c in found] == [(), ("jit(step)/mixer/while",), (), ()]


def test_text_of_gpu_programs():
    text = """\
HloModule m, replica_count=1, num_partitions=8

ENTRY %main (p: f32[8]) -> f32[64] {
  %g = ((f32[8]{0}, bf16[2]{0}), (f32[64]{0}, bf16[16]{0})) all-gather-start(%p), replica_groups={}, dimensions={0}
  %d = (f32[64]{0}, bf16[16]{0}) all-gather-done(%g)
  %r = ((f32[64]{0}), f32[8]{0}) reduce-scatter-start(%p), replica_groups=[1,8]<=[8]
}
"""
    assert counted(text) == [("all-gather", 64 * 4 + 16 * 2, 8, 1, 0), ("reduce-scatter", 64 * 4, 8, 1, 0)]
