"""Programs with a known defect, each of which the PTX simulator must refuse with the place; and their sound twins."""

from __future__ import annotations

import numpy as np
import pytest

from ptxsim.open_bits import open_bits
from ptxsim.program import Module, SimulatorError, run
from ptxsim.snippets import kernel, refused

# ---- asynchronous copies


COPIES = """
    .shared .align 16 .b8 stage[2048];
    shl.b32 %r1, %r0, 4; mov.u32 %r2, stage; add.u32 %r3, %r2, %r1; cvt.u64.u32 %d10, %r1; add.s64 %d11, %d1, %d10;
    cp.async.cg.shared.global [%r3], [%d11], 16; cp.async.commit_group;
    cp.async.ca.shared.global [%r3+1024], [%d11+4], 4, 4; cp.async.ca.shared.global [%r3+1028], [%d11+4], 4, 0;
    cp.async.ca.shared.global [%r3+1032], [%d11], 8, 3; cp.async.commit_group;
    {wait}
    bar.sync 0;
    xor.b32 %r4, %r1, 1008; add.u32 %r5, %r2, %r4; ld.shared.v4.u32 {{%r10, %r11, %r12, %r13}}, [%r5];
    mad.wide.u32 %d5, %r0, 32, %d2; st.global.v4.u32 [%d5], {{%r10, %r11, %r12, %r13}};
    {last}
    ld.shared.v4.u32 {{%r10, %r11, %r12, %r13}}, [%r3+1024]; st.global.v4.u32 [%d5+16], {{%r10, %r11, %r12, %r13}};"""


@pytest.mark.parametrize("lazy", [False, True])
def test_asynchronous_copies(lazy: bool) -> None:
    x = np.arange(1, 257, dtype=np.uint32) * 0x01010101
    out = np.zeros((64, 8), np.uint32)
    body = COPIES.format(wait="cp.async.wait_group 1;", last="cp.async.wait_all;")
    for sched in (0, 1, 2):
        run(kernel(body, 2), "k", 1, 64, [x, out], lazy_async=lazy, race=True, sched=sched)
        rows = x.reshape(64, 4)
        assert (out[:, :4] == rows[::-1]).all()
        assert (out[:, 4:] == np.stack([rows[:, 1], 0 * rows[:, 0], rows[:, 0] & 0xFFFFFF, 0 * rows[:, 0]], 1)).all()


EXCHANGE = """
    .shared .align 4 .b8 box[256]; shl.b32 %r1, %r0, 2; mov.u32 %r2, box; add.u32 %r3, %r2, %r1; st.shared.u32 [%r3], %r0;
    {barrier}
    xor.b32 %r4, %r1, {other}; add.u32 %r4, %r4, %r2; ld.shared.u32 %r5, [%r4]; mad.wide.u32 %d5, %r0, 4, %d1;
    st.global.u32 [%d5], %r5;"""


@pytest.mark.parametrize("sched", [0, 1, 2])
def test_dropped_barrier(sched: int) -> None:
    good = kernel(EXCHANGE.format(barrier="bar.sync 0;", other=252), 1)
    run(good, "k", 1, 64, [np.zeros(64, np.uint32)], race=True, sched=sched)
    refused(
        kernel(EXCHANGE.format(barrier="", other=252), 1), "race", "shared+", "ld.shared.u32", block=64, race=True, sched=sched
    )
    refused(kernel(EXCHANGE.format(barrier="bar.warp.sync -1;", other=252), 1), "race", block=64, race=True, sched=sched)


@pytest.mark.parametrize("sched", [0, 1, 2])
def test_dropped_warp_barrier(sched: int) -> None:
    run(
        kernel(EXCHANGE.format(barrier="bar.warp.sync -1;", other=60), 1),
        "k",
        1,
        64,
        [np.zeros(64, np.uint32)],
        race=True,
        sched=sched,
    )
    refused(kernel(EXCHANGE.format(barrier="", other=60), 1), "race", block=64, race=True, sched=sched)


def test_write_after_read() -> None:
    body = EXCHANGE.format(barrier="bar.sync 0;", other=252) + "\n{} st.shared.u32 [%r3], 5;"
    run(kernel(body.replace("{}", "bar.sync 0;"), 1), "k", 1, 64, [np.zeros(64, np.uint32)], race=True)
    refused(kernel(body.replace("{}", ""), 1), "race: write", "after its read", block=64, race=True)


def test_two_writers() -> None:
    body = ".shared .align 4 .b8 box[4]; mov.u32 %r2, box; st.shared.u32 [%r2], {};"
    run(kernel(body.format("7"), 1), "k", 1, 64, [np.zeros(64, np.uint32)], race=True)  # the same value: let pass
    refused(kernel(body.format("%r0"), 1), "race: write", "after its write", block=64, race=True)


@pytest.mark.parametrize("lazy", [False, True])
def test_missing_wait(lazy: bool) -> None:
    x, out = np.arange(256, dtype=np.uint32), np.zeros((64, 8), np.uint32)
    for wait, last in (
        ("", "cp.async.wait_all;"),
        ("cp.async.wait_group 2;", "cp.async.wait_all;"),
        ("cp.async.wait_group 1;", ""),
    ):
        text = kernel(COPIES.format(wait=wait, last=last), 2)
        refused(text, "cp.async", "not waited for", block=64, args=[x, out], race=True, lazy_async=lazy)
    run(kernel(COPIES.format(wait="", last="cp.async.wait_all;"), 2), "k", 1, 64, [x, out], lazy_async=True)
    assert (out[:, 0] == 0x7FC0DEAD).any()  # without the race detector, too: a warp that goes on at once finds nothing


def test_out_of_bounds() -> None:
    text = kernel("mad.wide.u32 %d5, %r0, 4, %d1; ld.global.u32 %r1, [%d5]; st.global.u32 [%d5+4], %r1;", 1)
    run(text, "k", 1, 32, [np.zeros(33, np.uint32)])
    refused(
        text,
        "out-of-bounds store of 4 bytes at argument 0+128",
        "a buffer of 128 bytes",
        "thread (31,0,0)",
        "st.global.u32 [%d5+4]",
        args=[np.zeros(32, np.uint32)],
    )
    refused(text, "out-of-bounds load", args=[np.zeros(16, np.uint32)])
    refused(text, "out-of-bounds load", args=[None])
    refused(
        kernel(".shared .align 4 .b8 s[64]; mov.u32 %r1, s; ld.shared.u32 %r2, [%r1+64];", 1),
        "out-of-bounds load",
        "shared address 64",
    )
    refused(
        kernel(".local .align 4 .b8 s[64]; mov.u64 %d2, s; ld.local.u32 %r2, [%d2+64];", 1),
        "out-of-bounds load",
        "local address 64",
    )


def test_copy_out_of_bounds() -> None:
    """Of a copy only the valid bytes must lie in a buffer, but all of them in one."""
    body = ".shared .align 16 .b8 s[512]; shl.b32 %r2, %r0, 4; mov.u32 %r1, s; add.u32 %r1, %r1, %r2;"
    body += "cp.async.cg.shared.global [%r1], [%d1+112], 16, {}; cp.async.wait_all;"
    run(kernel(body.format(4), 1), "k", 1, 32, [np.zeros(29, np.uint32)])
    refused(kernel(body.format(8), 1), "out-of-bounds load of 8 bytes at argument 0+112", args=[np.zeros(29, np.uint32)])
    refused(
        kernel(body.format(4), 1),
        "out-of-bounds store of 16 bytes at shared address 512",
        block=64,
        args=[np.zeros(29, np.uint32)],
    )


def test_misaligned() -> None:
    refused(
        kernel("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%d1+8];", 1),
        "misaligned load of 16 bytes",
        "block (0,0,0), thread (0,0,0)",
    )
    refused(
        kernel(".shared .align 4 .b8 s[64]; mov.u32 %r1, s; cp.async.ca.shared.global [%r1], [%d1+2], 4;", 1),
        "misaligned cp.async",
    )


def test_read_only() -> None:
    x = np.zeros(64, np.uint32)
    x.flags.writeable = False
    refused(kernel("st.global.u32 [%d1+8], 1;", 1), "argument 0+8, which is read-only", args=[x])
    refused(kernel("red.global.add.u32 [%d1+8], 1;", 1), "read-only", args=[x])


def test_divergent_collective() -> None:
    lanes = "setp.lt.u32 %p1, %r0, 16; @%p1 bra SKIP; {} SKIP: bar.warp.sync -1;"
    refused(kernel(lanes.format("shfl.sync.idx.b32 %r1, %r0, 0, 31, -1;"), 1), "deadlock", "shfl.sync", "bar.warp.sync")
    refused(kernel(lanes.format("shfl.sync.idx.b32 %r1, %r0, 0, 31, 0xffff;"), 1), "not in the member mask 0x0000ffff")
    refused(
        kernel(lanes.format("shfl.sync.idx.b32 %r1, %r0, 0, 31, 0xffff0000;"), 1),
        "shuffle from lane 0, which does not take part",
    )
    refused(
        kernel("setp.lt.u32 %p1, %r0, 16; @%p1 bra A; bar.sync 0; bra B; A: bar.sync 0; B:", 1), "deadlock", "aligned barrier"
    )
    four, two = "{%r1, %r2, %r3, %r4}", "{%r1, %r2}"
    half = (
        f"setp.lt.u32 %p1, %r0, 16; @%p1 ret; mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {four}, {four}, {two}, {four};"
    )
    refused(kernel(half, 1), "all 32 lanes")


def test_deadlock() -> None:
    text = refused(
        kernel("setp.lt.u32 %p1, %r0, 32; @%p1 bra A; bar.sync 1; bra B; A: bar.sync 2; B:", 1),
        "deadlock in block (0,0,0)",
        block=64,
    )
    assert "waits at barrier 1" in text and "waits at barrier 2" in text and "PTX line" in text
    refused(kernel("L: bra L;", 1), "endless", max_steps=10000)


def test_spinning_lanes_let_others_on() -> None:
    """Lane 0 waits for lane 1 of its own warp: independent threads, whatever the schedule."""
    body = """setp.eq.u32 %p1, %r0, 0; @!%p1 bra SET; SPIN: ld.volatile.global.u32 %r1, [%d1]; setp.eq.u32 %p2, %r1, 0;
        @%p2 bra SPIN; bra OUT;
              SET: st.volatile.global.u32 [%d1], 1; OUT:"""
    for sched in (0, 1, 2):
        run(kernel(body, 1), "k", 1, 2, [np.zeros(1, np.uint32)], sched=sched)


@pytest.mark.parametrize("sched", [0, 1, 2])
def test_race_between_blocks(sched: int) -> None:
    base = "mov.u32 %r1, %ctaid.x; mad.lo.u32 %r2, %r1, {step}, %r0; mad.wide.u32 %d5, %r2, 4, %d1;"
    run(
        kernel(base.format(step=32) + "st.global.u32 [%d5], %r2;", 1),
        "k",
        4,
        32,
        [np.zeros(128, np.uint32)],
        race=True,
        sched=sched,
    )
    text = kernel(base.format(step=31) + "st.global.u32 [%d5], %r2;", 1)
    said = refused(
        text,
        "race between blocks",
        "argument 0+",
        "st.global.u32",
        grid=4,
        args=[np.zeros(128, np.uint32)],
        race=True,
        sched=sched,
    )
    assert said.count("block (") >= 2
    text = kernel(base.format(step=32) + "st.global.u32 [%d5], 1; ld.global.u32 %r3, [%d1]; st.global.u32 [%d2], 1;", 2)
    refused(
        text, "race between blocks", grid=4, args=[np.zeros(128, np.uint32), np.zeros(1, np.uint32)], race=True, sched=sched
    )


def test_race_within_a_block_through_global_memory() -> None:
    body = """mad.wide.u32 %d5, %r0, 4, %d1; st.global.u32 [%d5], %r0; {}
        xor.b32 %r1, %r0, 63; mad.wide.u32 %d6, %r1, 4, %d1; ld.global.u32 %r2, [%d6];"""
    run(kernel(body.format("bar.sync 0;"), 1), "k", 1, 64, [np.zeros(64, np.uint32)], race=True)
    refused(
        kernel(body.format(""), 1), "race: ", "argument 0+", "st.global.u32 [%d5]", "ld.global.u32 %r2", block=64, race=True
    )


def test_unknown_text() -> None:
    for bad, why in (
        ("frobnicate.u32 %r1, %r0;", "unknown instruction"),
        ("add.rn.u32 %r1, %r0, %r0;", "modifier"),
        ("add.u32 %r1, %r0, %d1;", "operand %d1"),
        ("mov.u32 %r1, %nowhere;", "special register"),
        ("bra GONE;", "no label GONE"),
        ("ld.global.u32 %d1, %r0;", "address"),
        ("ld.global.mystery %r1, [%d1];", "not understood"),
    ):
        assert "PTX line" in refused(kernel(bad, 1), why)
    with pytest.raises(SimulatorError, match="no kernel z; there are: k"):
        Module(kernel("", 1)).kernel("z")
    with pytest.raises(SimulatorError, match="not a launch that a GPU takes"):
        run(kernel("", 1), "k", 1, 2048, [None])


def test_counts() -> None:
    report = run(
        kernel("fma.rn.f32 %f1, %f2, %f3, %f4; setp.lt.u32 %p1, %r0, 5; @%p1 fma.rn.f32 %f1, %f2, %f3, %f4;", 1),
        "k",
        2,
        40,
        [None],
    )
    assert report.lanes["fma.rn.f32"] == 2 * (40 + 5) and report.executed["fma.rn.f32"] == 2 * 4


def test_open_bits() -> None:
    body = """add.rn.f32 %f1, %f2, %f3; mul.f32 %f4, %f1, %f1; ex2.approx.ftz.f32 %f5, %f4; div.full.f32 %f6, %f5, %f4;
        red.global.add.f32 [%d1], %f1;
        red.global.add.u32 [%d1], 1; mov.u32 %r1, %clock; fma.rn.f32 %f1, %f1, %f1, %f1; div.rn.f32 %f1, %f1, %f1;
        sub.s32 %r2, %r1, %r0;
        mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1,%r2,%r3,%r4}, {%r1,%r2,%r3,%r4}, {%r1,%r2}, {%r1,%r2,%r3,%r4};
        mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32
            {%r1,%r2,%r3,%r4}, {%r1,%r2,%r3,%r4}, {%r1,%r2}, {%r1,%r2,%r3,%r4};"""
    found = open_bits(kernel(body, 1), "k")
    opcodes = sorted(op for counts in found.values() for op in counts)
    assert opcodes == [
        "div.full.f32",
        "ex2.approx.ftz.f32",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
        "mov.u32",
        "mul.f32",
        "red.global.add.f32",
    ]
    assert open_bits(kernel("fma.rn.f32 %f1, %f1, %f1, %f1;", 1), "k") == {}
