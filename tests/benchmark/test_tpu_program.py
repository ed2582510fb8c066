"""Check executions and bytes of HBM of operations in shortened programs of the TPU compiler."""

import pytest

from ttt_jax.benchmark.tpu_schedule import hlo_operations, parts
from ttt_jax.planning import hlo

TEXT = """\
HloModule jit_f, is_scheduled=true

%view (p: bf16[512,256]) -> bf16[512,256] {
  %p = bf16[512,256]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %b = bf16[512,256]{1,0:T(8,128)(2,1)} bitcast(%p)
}

%slices (p0: f32[100,16,64], p1: s32[], p2: bf16[512,256]) -> f32[1,16,64] {
  %p0 = f32[100,16,64]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)S(6)} parameter(1)
  %p2 = bf16[512,256]{1,0:T(8,128)(2,1)} parameter(2)
  %nested = bf16[512,256]{1,0:T(8,128)(2,1)} fusion(%p2), kind=kLoop, calls=%view
  %zero = s32[]{:T(128)} constant(0)
  %d = f32[1,16,64]{2,1,0:T(8,128)} dynamic-slice(%p0, %p1, %zero, %zero, /*index=5*/%zero), \
dynamic_slice_sizes={1,16,64}
  %c = f32[16,64]{1,0:T(8,128)} convolution(%d, %nested), dim_labels=bf_io->bf
  ROOT %r = f32[1,16,64]{2,1,0:T(8,128)S(1)} reshape(%c)
}

%slices.2 (q0: f32[100,16,64], q1: s32[], q2: bf16[512,256]) -> f32[1,16,64] {
  %q1 = s32[]{:T(128)S(6)} parameter(1)
  %q0 = f32[100,16,64]{2,1,0:T(8,128)} parameter(0)
  %q2 = bf16[512,256]{1,0:T(8,128)(2,1)} parameter(2)
  %nested.2 = bf16[512,256]{1,0:T(8,128)(2,1)} fusion(%q2), kind=kLoop, calls=%view
  %zero.2 = s32[]{:T(128)} constant(0)
  %d.2 = f32[1,16,64]{2,1,0:T(8,128)} dynamic-slice(%q0, %q1, %zero.2, %zero.2, /*index=5*/%zero.2), \
dynamic_slice_sizes={1,16,64}
  %c.2 = f32[16,64]{1,0:T(8,128)} convolution(%d.2, %nested.2), dim_labels=bf_io->bf
  ROOT %r.2 = f32[1,16,64]{2,1,0:T(8,128)S(1)} reshape(%c.2)
}

%updates (u0: f32[100,16,64], u1: f32[1,16,64], u2: s32[]) -> (f32[100,16,64], f32[16]) {
  %u0 = f32[100,16,64]{2,1,0:T(8,128)} parameter(0)
  %u1 = f32[1,16,64]{2,1,0:T(8,128)S(1)} parameter(1)
  %u2 = s32[]{:T(128)S(6)} parameter(2)
  %u3 = s32[]{:T(128)} constant(0)
  %new = f32[100,16,64]{2,1,0:T(8,128)} dynamic-update-slice(%u0, %u1, %u2, %u3, %u3)
  %sum = f32[16]{0:T(128)} reduce(%u1, %u3), dimensions={0,2}, to_apply=%add
  ROOT %t = (f32[100,16,64]{2,1,0:T(8,128)}, f32[16]{0:T(128)}) tuple(%new, %sum)
}

%body (s: (s32[], f32[100,16,64], bf16[512,256])) -> (s32[], f32[100,16,64], bf16[512,256]) {
  %s = (s32[]{:T(128)}, f32[100,16,64]{2,1,0:T(8,128)}, bf16[512,256]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %x = f32[100,16,64]{2,1,0:T(8,128)} get-tuple-element(%s), index=1
  %w = bf16[512,256]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=2
  %fusion.1 = f32[1,16,64]{2,1,0:T(8,128)S(1)} fusion(%x, %i, %w), kind=kOutput, calls=%slices, \
metadata={op_name="jit(step)/while/body/dot_general"}
  %fusion.2 = f32[1,16,64]{2,1,0:T(8,128)S(1)} fusion(%x, %i, %w), kind=kOutput, calls=%slices.2, \
metadata={op_name="jit(step)/other"}, backend_config={"used_scoped_memory_configs":\
[{"memory_space":"1","offset":"0","size":"1572864"}],"retry_config":{}}
  %fusion.3 = (f32[100,16,64]{2,1,0:T(8,128)}, f32[16]{0:T(128)}) fusion(%x, %fusion.1, %i), kind=kLoop, \
calls=%updates, metadata={op_name="jit(step)/while/body/update"}
  %y = f32[100,16,64]{2,1,0:T(8,128)} get-tuple-element(%fusion.3), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)S(6)} add(%i, %two)
  ROOT %t.2 = (s32[], f32[100,16,64]{2,1,0:T(8,128)}, bf16[512,256]{1,0:T(8,128)(2,1)}) tuple(%next, %y, %w)
}

%condition (s.2: (s32[], f32[100,16,64], bf16[512,256])) -> pred[] {
  %s.2 = (s32[]{:T(128)}, f32[100,16,64]{2,1,0:T(8,128)}, bf16[512,256]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%s.2), index=0
  %limit = s32[]{:T(128)} constant(200)
  ROOT %lt = pred[]{:T(512)} compare(%i.2, %limit), direction=LT
}

ENTRY %main (a: f32[100,16,64], b: bf16[512,256]) -> f32[16,100] {
  %a = f32[100,16,64]{2,1,0:T(8,128)} parameter(0), metadata={op_name="a"}
  %b.2 = bf16[512,256]{1,0:T(8,128)(2,1)} parameter(1), metadata={op_name="b"}
  %copy-start = (bf16[512,256]{1,0:T(8,128)(2,1)S(1)}, bf16[512,256]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%b.2)
  %copy-done = bf16[512,256]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %buffer = f32[16,100]{1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  %begin = s32[]{:T(128)} constant(0)
  %t.3 = (s32[], f32[100,16,64]{2,1,0:T(8,128)}, bf16[512,256]{1,0:T(8,128)(2,1)}) tuple(%begin, %a, %b.2)
  %while = (s32[], f32[100,16,64]{2,1,0:T(8,128)}, bf16[512,256]{1,0:T(8,128)(2,1)}) while(%t.3), \
condition=%condition, body=%body, metadata={op_name="jit(step)/while"}
  %z = f32[100,16,64]{2,1,0:T(8,128)} get-tuple-element(%while), index=1
  %slice = f32[100,16,1]{1,0,2:T(8,128)} slice(%z), slice={[0:100], [0:16], [0:1]}
  %same = f32[100,16]{1,0:T(8,128)} bitcast(%slice)
  ROOT %copy = f32[16,100]{1,0:T(8,128)} copy(%same), metadata={op_name="jit(step)/transpose"}
}
"""
ROW = 16 * 128 * 4  # f32[1,16,64], its last axis padded to 128


@pytest.fixture(scope="module")
def found():
    return hlo_operations.read(TEXT)


@pytest.fixture(scope="module")
def operations(found):
    return {o.name: o for o in found.operations}


def test_executions_of_operations(found, operations):
    assert {name: o.times for name, o in operations.items()} == {
        "copy-start": 1, "copy-done": 1, "buffer": 1, "fusion.1": 100, "fusion.2": 100, "fusion.3": 100, "next": 100,
        "slice": 1, "copy": 1,
    }  # fmt: skip
    assert found.loops == [("jit(step)/while", 100)]
    assert found.conditionals == 0


def test_bytes_of_sliced_operands(operations):
    """Check that a sliced array counts a row, one read in full counts whole, and vector memory counts nothing."""
    assert operations["fusion.1"].hbm_bytes == ROW + 512 * 256 * 2


def test_bytes_of_updates_in_place(operations):
    """Check that an updated array counts a row, and a vector counts with its padding."""
    assert operations["fusion.3"].hbm_bytes == ROW + 128 * 4


def test_bytes_of_single_operations(operations):
    """Read the slice, write it: 100 rows of 16, padded to 104 and 128; then the transpose, 16 rows of 128."""
    assert operations["slice"].hbm_bytes == 2 * 104 * 128 * 4
    assert operations["copy"].hbm_bytes == 104 * 128 * 4 + 16 * 128 * 4


def test_bytes_of_copies_between_memories(operations):
    """Check copies that run beside other operations, of which only one side is HBM."""
    assert (operations["copy-start"].hbm_bytes, operations["copy-start"].asynchronous) == (512 * 256 * 2, True)
    assert (operations["copy-done"].hbm_bytes, operations["copy-done"].asynchronous) == (0, True)
    assert operations["buffer"].hbm_bytes == 0
    assert not operations["fusion.1"].asynchronous


def test_origins_of_operations(operations):
    assert operations["fusion.1"].op_name == "jit(step)/while/body/dot_general"
    assert operations["slice"].op_name == "jit(step)/transpose"  # from the operation that uses its result
    assert operations["copy-start"].op_name == ""  # nothing uses its result


def test_equal_operations_have_equal_signatures(operations):
    assert operations["fusion.1"].signature == operations["fusion.2"].signature
    changed = TEXT.replace("dynamic-slice(%q0, %q1, %zero.2", "dynamic-slice(%q0, %zero.2, %q1")
    others = {o.name: o for o in hlo_operations.read(changed).operations}
    assert others["fusion.1"].signature == operations["fusion.1"].signature
    assert others["fusion.2"].signature != operations["fusion.2"].signature


def test_vector_memory_of_an_operation(operations):
    assert {name for name, o in operations.items() if o.vmem_bytes} == {"fusion.2"}
    assert operations["fusion.2"].vmem_bytes == 1572864


def test_a_loop_with_an_unknown_trip_count():
    found = hlo_operations.read(TEXT.replace("constant(200)", "add(%s.2, %s.2)"))
    assert found.loops == [("jit(step)/while", None)]
    assert next(o.times for o in found.operations if o.name == "fusion.1") == 1
    known = TEXT.replace("body=%body,", 'body=%body, backend_config={"known_trip_count":{"n":"7"}},')
    assert hlo_operations.read(known).loops == [("jit(step)/while", 7)]


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("bf16[512,256]{1,0:T(8,128)(2,1)}", 512 * 256 * 2),
        ("f32[12,64]{1,0:T(8,128)}", 16 * 128 * 4),
        ("f32[12,64]{0,1:T(8,128)}", 64 * 128 * 4),  # the first axis is the fastest
        ("f32[3,12,64]{0,2,1:T(8,128)}", 12 * 64 * 128 * 4),
        ("f32[100]{0:T(128)}", 128 * 4),
        ("pred[8,128]{1,0:T(8,128)(4,1)}", 8 * 128),
        ("s4[8,128]{1,0:T(8,128)}", 8 * 128 // 2),
        ("f32[12,64]{1,0}", 12 * 64 * 4),
        ("f32[12,64]{1,0:T(8,128)S(1)}", 0),
        ("s32[]{:T(128)}", 0),
        ("(f32[8,128]{1,0:T(8,128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)})", 8 * 128 * 4),
    ],
)
def test_bytes_of_hbm(shape, size):
    assert hlo.hbm_bytes(shape) == size


def test_parts_of_a_step():
    stack = "jit(step)/jvp(LanguageModel)/while/body/closed_call/layers._read/layers/"
    names = {
        stack + "mixer/mixer._inner_loop/while/body/dot_general": "inner loop",
        stack + "mixer/wq/dot_general": "rest of the mixer",
        stack + "mixer_norm/mul": "rest of the mixer",
        stack + "mlp/up/dot_general": "feed-forward",
        stack + "conv/mul": "rest of the blocks",
        "jit(step)/transpose(jvp(LanguageModel))/while/body/dynamic_slice": "rest of the blocks",
        "jit(step)/jvp(LanguageModel)/dot_general": "embedding, head, loss",
        "jit(step)/jvp()/reduce_sum": "embedding, head, loss",
        "jit(step)/add": "optimizer",
        "": "of unknown origin",
    }
    assert {name: parts.part_of(name) for name in names} == names


@pytest.mark.parametrize(
    ("op_name", "found"),
    [
        ("jit(step)/jvp(LanguageModel)/while/body/closed_call/layers._call/layers/mlp/up/dot_general",
         ("forward", "layers/mlp/up/dot_general")),
        ("jit(step)/transpose(jvp(LanguageModel))/while/body/closed_call/checkpoint/rematted_computation/layers._call/"
         "layers/mixer/mixer._qkv/wq/dot_general", ("again", "layers/mixer/wq/dot_general")),
        ("jit(step)/transpose(jvp(LanguageModel))/while/body/closed_call/checkpoint/layers._call/layers/mixer/"
         "mixer._inner_loop/shard_map/ttt_linear_backward/pallas_call",
         ("backward", "layers/mixer/_inner_loop/ttt_linear_backward")),
        ("jit(step)/jvp(LanguageModel)/while/body/closed_call/layers._read/layers/mixer/mixer._inner_loop/shard_map/mul",
         ("forward", "layers/mixer/_inner_loop/mul")),
        ("jit(step)/transpose(jvp(LanguageModel))/while/body/jit(dynamic_index_in_dim)/dynamic_slice",
         ("backward", "dynamic_index_in_dim/dynamic_slice")),
        ("jit(f)/jvp(vmap(sparse))/jit(_attention)/fwd/fwd/pallas_call", ("forward", "sparse/_attention/fwd")),
        ("jit(step)/add", ("", "add")),
        ("k", ("", "k")),
        ("", ("", "")),
    ],
)  # fmt: skip
def test_place_of_an_operation_in_the_model(op_name, found):
    assert (parts.pass_of(op_name), parts.place_of(op_name)) == found


MASKED = """\
HloModule m, is_scheduled=true

%body (s: (s32[], s8[1,2,3], f32[8,128])) -> (s32[], s8[1,2,3], f32[8,128]) {
  %s = (s32[]{:T(128)}, s8[1,2,3]{2,1,0:T(4,128)(4,1)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %mask = s8[1,2,3]{2,1,0:T(4,128)(4,1)} get-tuple-element(%s), index=1
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%s), index=2
  %start = (s8[1,2,3]{2,1,0:T(4,128)(4,1)S(1)}, s8[1,2,3]{2,1,0:T(4,128)(4,1)}, u32[]{:S(2)}) copy-start(%mask)
  %done = s8[1,2,3]{2,1,0:T(4,128)(4,1)S(1)} copy-done(%start)
  %kernel = f32[8,128]{1,0:T(8,128)} custom-call(%done, %x), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"block": 1024
}}, metadata={op_name="jit(f)/attention/pallas_call"}
  ROOT %t = (s32[]{:T(128)}, s8[1,2,3], f32[8,128]{1,0:T(8,128)}) tuple(%i, %mask, %kernel)
}

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %constant = s8[1,2,3]{2,1,0:T(4,128)(4,1)} constant({ { { 1, 0, 2 }, { -1, 3, 0 } } })
  %t.2 = (s32[]{:T(128)}, s8[1,2,3], f32[8,128]{1,0:T(8,128)}) tuple(%zero, %constant, %a)
  %while = (s32[]{:T(128)}, s8[1,2,3], f32[8,128]{1,0:T(8,128)}) while(%t.2), condition=%none, body=%body
  ROOT %r = f32[8,128]{1,0:T(8,128)} get-tuple-element(%while), index=2
}
"""


def test_constant_operands_of_a_kernel():
    """Check a mask that is carried through a loop: two rows in the bytes of a word, padded to 128 words."""
    (kernel,) = (o for o in hlo_operations.read(MASKED).operations if o.name == "kernel")
    assert kernel.op_name == "jit(f)/attention/pallas_call"  # behind an attribute with line breaks
    ((operand, words),) = kernel.constants
    assert (operand, words[:4], len(words)) == (0, (0xFF01, 0x0300, 0x0002, 0), 128)


@pytest.mark.parametrize(
    "changed",
    [
        MASKED.replace("tuple(%i, %mask, %kernel)", "tuple(%i, %done, %kernel)"),  # copied, in another memory
        MASKED.replace("tuple(%i, %mask, %kernel)", "tuple(%i, %kernel, %kernel)"),
        MASKED.replace("{ { { 1, 0, 2 }, { -1, 3, 0 } } }", "{...}"),
        MASKED.replace("= s8[1,2,3]{2,1,0:T(4,128)(4,1)} constant(", "= s8[1,2,3]{2,1,0:T(4,128)(4,1)} negate("),
    ],
)
def test_operands_that_are_no_constants(changed):
    (kernel,) = (o for o in hlo_operations.read(changed).operations if o.name == "kernel")
    assert changed != MASKED
    assert kernel.constants == ()


def test_a_collective_inside_a_fusion():
    """Check that neither a collective that runs beside the work of a fusion nor an array that passes through counts."""
    text = """\
%gather (p0: bf16[8,256], p1: bf16[32,256], p2: f32[8,128]) -> (f32[8,128], bf16[32,256], bf16[32,256]) {
  %p0 = bf16[8,256]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[32,256]{1,0:T(8,128)(2,1)} parameter(1)
  %p2 = f32[8,128]{1,0:T(8,128)} parameter(2)
  %work = f32[8,128]{1,0:T(8,128)} negate(%p2)
  %all = bf16[32,256]{1,0:T(8,128)(2,1)} all-gather(%p0), channel_id=4, replica_groups=[1,4]<=[4]
  ROOT %t = (f32[8,128]{1,0:T(8,128)}, bf16[32,256]{1,0:T(8,128)(2,1)}, bf16[32,256]{1,0:T(8,128)(2,1)}) \
tuple(%work, %all, %p1)
}

ENTRY %main (a: bf16[8,256], b: bf16[32,256], c: f32[8,128]) -> f32[8,128] {
  %a = bf16[8,256]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[32,256]{1,0:T(8,128)(2,1)} parameter(1)
  %c = f32[8,128]{1,0:T(8,128)} parameter(2)
  %f = (f32[8,128]{1,0:T(8,128)}, bf16[32,256]{1,0:T(8,128)(2,1)}, bf16[32,256]{1,0:T(8,128)(2,1)}) fusion(%a, %b, \
%c), kind=kLoop, calls=%gather
  ROOT %r = f32[8,128]{1,0:T(8,128)} get-tuple-element(%f), index=0
}
"""
    (fusion,) = hlo_operations.read(text).operations
    assert (fusion.name, fusion.hbm_bytes, fusion.asynchronous) == ("f", 2 * 8 * 128 * 4, False)
