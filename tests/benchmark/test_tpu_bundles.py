"""Compare cycles of operations, in shortened schedules of the TPU compiler, with counts by hand."""

import pytest

from ttt_jax.benchmark.tpu_schedule import bundles, scalar_run
from ttt_jax.benchmark.tpu_schedule import listing as listing_lib
from ttt_jax.benchmark.tpu_schedule.listing import ScheduleError

KEY = """\
= control target key start
LH: loop header
PF: predicated region fallthrough
CT: control target
= control target key end

"""
NAMES = "MATMUL, MATPUSH, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU"


def listing(*texts: str) -> str:
    """Return a listing of bundles with their addresses, the first without ``0x``."""
    return KEY + "\n".join(f"{f'{i:#x}' if i else '0':>6} {text}" for i, text in enumerate(texts))


def utilization(rows: int, slots: dict[int, str] | None = None) -> str:
    """Return a utilization file with rows of zeros, except those in ``slots``."""
    zeros = " ".join("0" * 11)
    lines = [(slots or {}).get(i, zeros) for i in range(rows)]
    head = [
        "== CAPACTIY:",
        NAMES,
        "    4     4     3     4     2     1     3     3     1     1     2",
        "== UTILIZATION:",
    ]
    return "\n".join([*head, *lines])


def counted(*texts: str, slots: dict[int, str] | None = None) -> bundles.Counts:
    return bundles.counts(listing(*texts), utilization(len(texts), slots))


# A pipelined loop of 5 turns: the first only loads and the last only stores, so that bundles 9 to 11 run in the three
# between them. After a branch, 4 more bundles run. The comment has lines and comments in it, as those of DMAs have.
PIPELINED = (
    "  :  { %s9_s7 = smov.u32 0 /* copy for cssa */ }",
    "LB: > { %s40_s8 = sadd.s32 4294967295, %s10_s7 /* iteration index, stage = 1 */"
    "  ;;  %s10_s7 = sphi %s9_s7, %s11_s7 /* phi copy */ }",
    "  : > { %p12_p0 = scmp.ge.s32.totalorder %s40_s8, 0  ;;  %p13_p1 = scmp.lt.s32.totalorder %s10_s7, 4 }",
    "  : > { %p14_p2 = pnand %p13_p1, %p12_p0 "
    "/*\nhlo: f.36\nbase: (%s49 = scalar_select /*predicate=*/%p48, 16)\n */ }",
    "  : > { %17 = sbr.rel (%p14_p2) target bundleno = 12 (0xc), region = 16 }",
    *["  : > {}"] * 4,
    "  : > { %v1_v0 = vld [vmem:[%s40_s8 + $0x38] sm:$0xff] }",
    "  : > { %39037 = vmatpush.bf16.msra.mxu0 %v1_v0 }",
    "  : > { %39149 = vmatmul.bf16.vlgmr.msra.gmra.mxu0 %v1_v0 }",
    "PF: > { %s11_s7 = sadd.s32 1, %s10_s7 }",
    "  : > { %p5_p3 = scmp.ge.s32.totalorder %s11_s7, 5 /* loop exit test */ }",
    "  : > { %6 = sbr.rel (!%p5_p3) target bundleno = 1 (0x1), region = 25 }",
    *["  : > {}"] * 4,
    "  :  { %99 = vsyncpa [#allocation4], 1 }",
)


def test_a_pipelined_loop():
    found = counted(*PIPELINED, slots={10: "0 2 0 0 0 0 0 0 0 0 0", 11: "16 0 0 0 0 0 1 1 0 0 0"})
    assert found.cycles == 1 + 5 * (4 + 4 + 3 + 4) + 3 * 3 + 1
    assert found.empty == 5 * (4 + 4)
    assert found.slots["MATPUSH"] == 3 * 2
    assert found.slots["MATMUL"] == 3 * 16
    assert (found.slots["VLOAD"], found.slots["VLOAD:FILL"], found.slots["VSTORE"]) == (3, 3, 0)
    assert (found.capacity["MATMUL"], found.capacity["VSTORE"]) == (4, 1)
    assert (found.uncertain, found.unknown_loops) == (0, 0)


@pytest.mark.parametrize("turns", [3, 400])
def test_nested_loops_with_a_spilled_counter(turns):
    """Check an outer counter that goes through memory, and an inner one that starts again each time."""
    found = counted(
        "  :  { %s1_s0 = smov.u32 0 }",
        "LB: > { %s2_s1 = sphi %s1_s0, %s9_s2  ;;  %7242 = sst [smem:[#allocation16_spill]] %s2_s1 }",
        "  : > { %s3_s3 = smov.u32 10 }",
        "LB: >> { %s4_s4 = sphi %s3_s3, %s5_s5 }",
        "  : >> { %s5_s5 = ssub.s32 %s4_s4, 2 }",
        "  : >> { %p6_p0 = scmp.gt.s32.totalorder %s5_s5, 0 }",
        "  : >> { %8 = sbr.rel (%p6_p0) target bundleno = 3 (0x3), region = 1 }",
        *["  : >> {}"] * 4,
        "  : > { %s8_s6 = sld [smem:[#allocation16_spill]] }",
        "  : > { %s9_s2 = sadd.s32 1, %s8_s6 }",
        f"  : > {{ %p10_p1 = scmp.ge.s32.totalorder %s9_s2, {turns} /* loop exit test */ }}",
        "  : > { %11 = sbr.rel (!%p10_p1) target bundleno = 1 (0x1), region = 2 }",
        *["  : > {}"] * 4,
        "  :  {}",
    )
    assert found.cycles == 1 + turns * (2 + 5 * 8 + 8) + 1
    assert found.unknown_loops == 0


def test_counters_of_several_dimensions():
    """Check 3 x 4 turns, where the inner counter wraps by a conditional move that advances the outer one."""
    found = counted(
        "  :  { %s1_s0 = smov.u32 0  ;;  %s2_s1 = smov.u32 0 }",
        "LB: > { %s3_s2 = sphi %s1_s0, %s20_s2  ;;  %s4_s3 = sphi %s2_s1, %s21_s3 }",
        "  : > { %s5_s4 = sadd.s32 1, %s3_s2  ;;  %s6_s5 = sadd.s32 1, %s4_s3 }",
        "  : > { %p7_p0 = scmp.ge.s32.totalorder %s5_s4, 4 }",
        "  : > { %s20_s2 = smov.u32 (%p7_p0, %s5_s4), 0  ;;  %s21_s3 = smov.u32 (!%p7_p0, %s6_s5), %s4_s3 }",
        "  : > { %p8_p1 = scmp.lt.s32.totalorder %s21_s3, 3 }",
        "  : > { %9 = sbr.rel (%p8_p1) target bundleno = 1 (0x1), region = 1 }",
        *["  : > {}"] * 4,
    )
    assert found.cycles == 1 + 12 * 10


def test_unknown_branches_are_counted_and_reported():
    """Check that a region behind a branch on memory counts, and that a loop with such an end counts as one turn."""
    found = counted(
        "  :  { %s1_s0 = sld [smem:[#allocation5]] }",
        "  :  { %p2_p0 = scmp.eq.s32.totalorder %s1_s0, 0 }",
        "  :  { %3 = sbr.rel (%p2_p0) target bundleno = 10 (0xa), region = 1 }",
        *["  :  {}"] * 4,
        *["  :  { %4 = vtrace 1 }"] * 3,
        "LB: > { %s5_s1 = sld [smem:[%s1_s0 + $0x4]] }",
        "  : > { %p6_p1 = scmp.lt.s32.totalorder %s5_s1, 128 }",
        "  : > { %7 = sbr.rel (%p6_p1) target bundleno = 10 (0xa), region = 2 }",
        *["  : > {}"] * 4,
    )
    assert (found.cycles, found.uncertain, found.unknown_loops) == (17, 3, 1)
    assert found.regions == (bundles.Region(cycles=3, passes=1, reached=1, known=False),)


# A kernel with 4 turns, which copies its first operand, bytes of 8 bits, to scalar memory when it begins. A turn goes
# through the region in bundles 13 to 15 where the byte of the turn is positive.
MASKED = (
    "  :  { %s9_s0 = inlined_call_operand.hbm [shape: s8[4], index: 0, kind: input, shape index: {}] /* operand 0 */ }",
    "  :  { %s1_s1 = sshll.u32 %s9_s0, 4  ;;  %s2_s1 = int_to_ptr.hbm [resolvable:$true] %s1_s1 }",
    "  :  { %s3_s2 = smov.u32 [#allocation3]  ;;  %s4_s3 = smov.u32 0 }",
    "  :  { %12 = dma.hbm_to_smem /*hbm=*/%s2_s1, /*size_in_granules=*/16, /*smem=*/%s3_s2, /*flag=*/[#allocation1] }",
    "LB: > { %s5_s4 = sphi %s4_s3, %s13_s4 }",
    "  : > { %s6_s5 = sld [smem:[#allocation3 + %s5_s4]] }",
    "  : > { %s7_s5 = sshll.u32 %s6_s5, 24 }",
    "  : > { %p8_p0 = scmp.le.s32.totalorder %s7_s5, 0 }",
    "  : > { %11 = sbr.rel (%p8_p0) target bundleno = 16 (0x10), region = 1 }",
    *["  : > {}"] * 4,
    *["  : > { %14 = vtrace 1 }"] * 3,
    "PF: > { %s13_s4 = sadd.s32 1, %s5_s4 }",
    "  : > { %p14_p1 = scmp.ge.s32.totalorder %s13_s4, 4 }",
    "  : > { %15 = sbr.rel (!%p14_p1) target bundleno = 4 (0x4), region = 2 }",
    *["  : > {}"] * 4,
)


@pytest.mark.parametrize(
    ("constants", "passes", "known"),
    [
        ({}, 4, False),
        ({1: (1, 0, 0, 1)}, 4, False),  # another operand
        ({0: (1, 0, 0, 1)}, 2, True),
        ({0: (0x0100, 0xFF, 1, 0)}, 1, True),  # only the lowest byte counts, and has a sign
        ({0: (1, 0)}, 3, False),  # nothing is known of the last two turns
    ],
)
def test_regions_that_a_constant_skips(constants, passes, known):
    found = bundles.counts(listing(*MASKED), utilization(len(MASKED)), constants)
    assert found.regions == (bundles.Region(cycles=3, passes=passes, reached=4, known=known),)
    assert (found.cycles, found.raw_cycles) == (4 + 4 * 16 + 3 * passes, 4 + 4 * 16 + 3 * 4)
    assert found.uncertain == (0 if known else 3 * passes)


def test_memory_into_which_a_kernel_stores_is_unknown():
    stores = [text.replace("vtrace 1", "sst [smem:[#allocation3]] %s5_s4") for text in MASKED]
    found = bundles.counts(listing(*stores), utilization(len(stores)), {0: (1, 0, 0, 1)})
    assert [(region.passes, region.known) for region in found.regions] == [(4, False)]


def test_an_unconditional_branch():
    found = counted(
        "  :  { %1 = sbr.rel target bundleno = 7 (0x7), region = 1 }", *["  :  {}"] * 6, "  :  { %2 = vtrace 1 }"
    )
    assert found.cycles == 1 + 4 + 1


@pytest.mark.parametrize(
    ("text", "rows", "message"),
    [
        ("", 1, "no bundles in the schedule"),
        (KEY, 1, "no bundles in the schedule"),
        (listing("  :  {}", "  :  {}").replace("0x1", "0x2"), 2, "bundle 2 in the place of bundle 1"),
        (listing("  :  { %1 = sbr.ind %s1_s0 }"), 1, "a branch of an unknown form: %1 = sbr.ind %s1_s0"),
        (listing("  :  {}", "  :  {}"), 3, "3 rows of utilization for 2 bundles"),
        (listing("  :  {}"), 0, "utilization of an unknown form: == CAPACTIY:"),
    ],
)
def test_unknown_forms_are_errors(text, rows, message):
    with pytest.raises(ScheduleError, match=message):
        bundles.counts(text, utilization(rows))


def test_a_schedule_that_does_not_end_is_an_error(monkeypatch):
    monkeypatch.setattr(scalar_run, "_MOST_SEGMENTS", 100)
    with pytest.raises(ScheduleError, match="does not end within 100 runs"):
        counted("LB: > { %1 = sbr.rel target bundleno = 0 (0x0), region = 1 }", *["  : > {}"] * 4)


def test_cycles_between_operations():
    """Check a and d once, b 10 times in a loop, and c 4 times as often in a loop inside it.

    Each bundle runs as often as the operations of its loop, and counts for the next of them, or else for the last.
    """
    text = listing(
        "  :  { %18 = inlined_call /* <late-initialization> */ }",
        "  :  { %111 = inlined_call %s33_s0, %s18_s1 /* %a.1 = copy(%bitcast.213) */ }",
        "  :  {}",
        "  : > {}",
        "  : > { %127 = inlined_call %s22_s0 /* %b = fusion(%x, %y) */ }",
        "  : >> {}",
        "  : >> { %143 = inlined_call %s23_s0 /* %c.fusion = fusion(%b) */ }",
        "  : >> { %25 = sbr.rel (!%p1_p1) target bundleno = 5 (0x5), region = 4 }",
        *["  : >> {}"] * 4,
        "  : > {}",
        "  : > { %26 = sbr.rel (!%p2_p2) target bundleno = 3 (0x3), region = 5 }",
        *["  : > {}"] * 4,
        "  :  { %200 = inlined_call %s23_s0 /* %d = fusion(%b) */ }",
        "  :  {}",
    )
    assert listing_lib.called(text) == ["a.1", "b", "c.fusion", "d"]
    assert listing_lib.cycles(text, {"a.1": 1, "b": 10, "c.fusion": 40, "d": 1}) == {
        "a.1": 2,
        "b": 10 * (2 + 6),
        "c.fusion": 40 * 7,
        "d": 3,
    }
