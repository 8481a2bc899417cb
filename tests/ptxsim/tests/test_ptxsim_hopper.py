"""mbarriers, tensor copies and wgmma in the PTX simulator: what they compute, against numpy and against mma.sync."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ptxsim.hopper import HEAD, Side, by_mma, halves, multiply
from ptxsim.program import ParseError, run
from ptxsim.snippets import refused
from ptxsim.tensormap import tensor_map

SWIZZLES = (128, 64, 32, 0)
HARD: dict[str, Any] = {"race": True, "lazy_async": True}


def numbers(rows: int, k: int, seed: int) -> np.ndarray:
    """Of few bits, so that both formats hold them, with exponents that differ: sums are rounded, and cut off in mode 2."""
    rng = np.random.default_rng(seed)
    return np.ldexp(rng.integers(-127, 128, (rows, k)), rng.integers(-12, 2, (rows, k))).astype(np.float32)


def check(k: int, a: Side, b: Side, kind: str = "f16", registers: bool = False, **options: Any) -> None:
    x, y = numbers(64, k, 1), numbers(b.rows, k, 2)
    got, _ = multiply(x, y, a, b, kind=kind, registers=registers, **options)
    want = np.full_like(got, np.nan)
    run(by_mma(b.rows, k, kind), "k", 1, 128, [halves(x, kind), halves(y, kind), want], mma=options.get("mma", 0))
    assert (got.view(np.uint32) == want.view(np.uint32)).all()
    exact = x.astype(float) @ y.T.astype(float)
    assert np.abs(got - exact).max() < 1e-4 * np.abs(exact).max()


# ---- wgmma equals mma.sync: its operands come by TMA through swizzled shared memory, the other's straight from global memory


@pytest.mark.parametrize("n", [8, 16, 24, 64, 136, 256])
def test_every_width(n: int) -> None:
    check(128, Side(64), Side(n), mma=2, **HARD)


@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_every_layout(swizzle: int, turned: tuple[bool, bool]) -> None:
    check(128, Side(64, swizzle, turned[0]), Side(64, swizzle, turned[1]), lazy_async=True)


@pytest.mark.parametrize("mma", range(4))
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_every_way_to_add(mma: int, kind: str) -> None:
    check(320, Side(64), Side(16), kind, mma=mma, sched=mma % 3, **HARD)


@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize("turned", [False, True])
def test_a_from_registers(swizzle: int, turned: bool) -> None:
    check(192, Side(64), Side(64, swizzle, turned), registers=True, mma=2, **HARD)


@pytest.mark.parametrize("sched", [0, 1, 2])
@pytest.mark.parametrize("stages", [2, 3, 8])
@pytest.mark.parametrize("lazy", [False, True])
def test_every_schedule(sched: int, stages: int, lazy: bool) -> None:
    check(448, Side(64), Side(8), stages=stages, sched=sched, seed=stages, race=True, lazy_async=lazy)


def test_without_a_sum_before() -> None:
    """scale-d = 0 forgets the sums, and a zero may get the sign of its products; negated operands."""
    x, y = numbers(64, 64, 3), numbers(8, 64, 4)
    line = "%d11, 1, 1, 1, 0, 0;"
    kernel_edit = ("mov.f32 %s0, 0f00000000;", "mov.f32 %s0, 0f7FC00000;")
    out, _ = multiply(x, y, Side(64), Side(8), edit=kernel_edit)
    assert np.isnan(out).any(), "the sums before count"
    zeros = np.zeros((64, 64), np.float32)
    for scale, sign in ((1, False), (0, True)):
        one = multiply(-zeros, y * 0 + 1, Side(64), Side(8), every=(line, f"%d11, {scale}, 1, 1, 0, 0;"))[0]
        assert (np.signbit(one) == sign).all()
    plain = multiply(x, y, Side(64), Side(8))[0]
    turned = multiply(x, y, Side(64), Side(8), every=(line, "%d11, 1, -1, 1, 0, 0;"))[0]
    assert (turned == -plain).all()


# ---- tensor copies


def copy(rank: int, box: list[int], at: list[int], x: np.ndarray, swizzle: int, to: int = 0, **options: Any) -> np.ndarray:
    """The shared memory after one copy of a box of elements of 16 bits."""
    size = int(np.prod(box)) * 2
    text = f"{HEAD}.visible .entry k(.param .align 64 .b8 m[128], .param .u64 out)\n{{ .reg .pred %p<3>; .reg .b32 %r<30>; "
    text += ".reg .b64 %d<9>; .shared .align 8 .b8 bar[8];\n"
    places = ", ".join(f"%r{10 + i}" for i in range(rank))
    text += "".join(f"mov.u32 %r{10 + i}, {v};\n" for i, v in enumerate(at))
    text += f"""mov.u32 %r1, memory; add.u32 %r1, %r1, {to}; and.b32 %r1, %r1, 0xffffff80; mov.u32 %r2, bar;
        mov.u32 %r3, %tid.x; mov.b64 %d1, m; cvta.param.u64 %d1, %d1; prefetch.tensormap [%d1];
        setp.ne.u32 %p1, %r3, 0; @%p1 bra READY; mbarrier.init.shared.b64 [%r2], 1; fence.proxy.async;
        mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r2], {size};
        cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint
            [%r1], [%d1, {{{places}}}], [bar], 0;
        mbarrier.arrive.shared.b64 %d2, [%r2]; WAIT: mbarrier.test_wait.shared.b64 %p2, [%r2], %d2; @!%p2 bra WAIT;
        READY: bar.sync 0; ld.param.u64 %d3, [out]; mov.u32 %r4, 0;
        NEXT: add.u32 %r5, %r4, %r3; shl.b32 %r5, %r5, 2; add.u32 %r6, %r1, %r5; ld.shared.b32 %r7, [%r6];
        cvt.u64.u32 %d4, %r5; add.s64 %d4, %d3, %d4; st.global.b32 [%d4], %r7; add.u32 %r4, %r4, 32;
        setp.lt.u32 %p1, %r4, {size // 4}; @%p1 bra NEXT; ret; }}\n""".replace("; ", ";\n")
    out = np.zeros(-(-size // 128) * 64, np.uint16)  # 32 threads read 4 bytes each
    memory = [(x.ctypes.data, x.nbytes, False, "x")]
    run(text, "k", 1, 32, [tensor_map(x, box, swizzle), out], 1024 + size, memory=memory, **options)
    return out[: size // 2]


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize(("rank", "at"), [(2, [0, 0]), (2, [-3, 5]), (2, [40, -2]), (3, [8, 1, 2]), (4, [0, 0, 1, -1])])
def test_copies_boxes(rank: int, at: list[int], swizzle: int, lazy: bool) -> None:
    """Zeros outside of the tensor, and pieces of 16 bytes where the swizzle puts them."""
    shape = [3, 4, 7, 72][-rank:]
    x = np.random.default_rng(0).integers(1, 60000, shape).astype(np.uint16)
    box = [(swizzle or 64) // 2, 9, 2, 2][:rank]
    got = copy(rank, box, at, x, swizzle, lazy_async=lazy, race=True).reshape(-1, box[0])
    padded = np.pad(x, [(16, 96)] * rank)
    here = tuple(slice(16 + c, 16 + c + b) for c, b in zip(at[::-1], box[::-1], strict=True))
    want = padded[here].reshape(-1, box[0])
    bits = {128: 3, 64: 2, 32: 1, 0: 0}[swizzle]
    for row in range(len(want)):
        for piece in range(box[0] // 8):
            address = row * box[0] * 2 + piece * 16
            address ^= (address >> 7 & (1 << bits) - 1) << 4
            assert (got.reshape(-1)[address // 2 : address // 2 + 8] == want[row, 8 * piece : 8 * piece + 8]).all()


def test_a_swizzle_goes_by_the_address() -> None:
    x = np.arange(64 * 8, dtype=np.uint16).reshape(8, 64)
    moved = copy(2, [64, 8], [0, 0], x, 128, to=256).reshape(8, 8, 8)
    for row in range(8):
        for piece in range(8):
            assert (moved[row, piece ^ (row + 2) % 8] == x[row, 8 * piece : 8 * piece + 8]).all()


# ---- mbarriers

COUNT = """mov.u32 %r0, %tid.x; mov.u32 %r1, bar; ld.param.u64 %d1, [out]; setp.ne.u32 %p1, %r0, 0; @%p1 bra READY;
    mbarrier.init.shared.b64 [%r1], {count}; READY: bar.sync 0; {body} ret; """


def mbarrier(body: str, count: int = 64) -> str:
    text = f"{HEAD}.visible .entry k(.param .u64 out)\n{{ .reg .pred %p<5>; .reg .b32 %r<20>; .reg .b64 %d<9>;\n"
    return text + ".shared .align 8 .b8 bar[8]; .shared .align 4 .b8 box[256];\n" + COUNT.format(body=body, count=count) + "}\n"


SHARE = """shl.b32 %r2, %r0, 2; mov.u32 %r3, box; add.u32 %r4, %r3, %r2; st.shared.u32 [%r4], %r0;
    {arrive}
    xor.b32 %r5, %r2, 252; add.u32 %r5, %r5, %r3; ld.shared.u32 %r6, [%r5]; cvt.u64.u32 %d2, %r2; add.s64 %d2, %d2, %d1;
    st.global.u32 [%d2], %r6;"""
WAYS = {
    "parity": "mbarrier.arrive.shared.b64 _, [%r1]; L: mbarrier.try_wait.parity.shared.b64 %p2, [%r1], 0; @!%p2 bra L;",
    "state": "mbarrier.arrive.shared.b64 %d3, [%r1]; L: mbarrier.test_wait.shared.b64 %p2, [%r1], %d3; @!%p2 bra L;",
    "hint": "mbarrier.arrive.release.cta.shared::cta.b64 %d3, [%r1], 1; "
    "L: mbarrier.try_wait.acquire.cta.shared::cta.b64 %p2, [%r1], %d3, 1000; @!%p2 bra L;",
    "generic": "cvt.u64.u32 %d4, %r1; cvta.shared.u64 %d4, %d4; mbarrier.arrive.b64 _, [%d4]; "
    "L: mbarrier.try_wait.parity.b64 %p2, [%d4], 0; @!%p2 bra L;",
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sched", [0, 1, 2])
def test_an_mbarrier_orders_what_threads_share(way: str, sched: int) -> None:
    out = np.zeros(64, np.uint32)
    run(mbarrier(SHARE.format(arrive=WAYS[way])), "k", 1, 64, [out], race=True, sched=sched)
    assert (out == np.arange(64)[::-1]).all()
    no_wait = WAYS[way].partition("L:")[0]
    refused(mbarrier(SHARE.format(arrive=no_wait)), "race: ", block=64, args=[out], race=True, sched=sched)


def test_phases_follow_each_other() -> None:
    """Eight phases over one place: thread 0 writes, announces bytes and reports them by hand, thread 32 only arrives."""
    body = "setp.ne.u32 %p3, %r0, 0; setp.ne.u32 %p4, %r0, 32;\n"
    for i in range(8):
        body += f"""@%p3 bra A{i}; mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 48; st.shared.u32 [box+{4 * i}], {i + 5};
            mbarrier.complete_tx.relaxed.cta.shared.b64 [%r1], 48; mbarrier.arrive.shared.b64 _, [%r1]; A{i}:
            @%p4 bra B{i}; mbarrier.arrive.shared.b64 _, [%r1]; B{i}: bar.warp.sync -1;
            L{i}: mbarrier.try_wait.parity.shared.b64 %p2, [%r1], {i % 2}; @!%p2 bra L{i};
            ld.shared.u32 %r7, [box+{4 * i}]; st.global.u32 [%d1+{4 * i}], %r7;\n"""
    out = np.zeros(8, np.uint32)
    for sched in (0, 1, 2):
        run(mbarrier(body, 3), "k", 1, 64, [out], race=True, sched=sched)
        assert (out == np.arange(8) + 5).all()


def test_registers_of_warpgroups() -> None:
    text = f"{HEAD}.visible .entry k()\n{{ .reg .pred %p<3>; .reg .b32 %r<3>; mov.u32 %r0, %tid.x;\n"
    text += "setp.lt.u32 %p1, %r0, 128; @%p1 bra FEW; setmaxnreg.inc.sync.aligned.u32 {}; bra END;\n"
    text += "FEW: setmaxnreg.dec.sync.aligned.u32 {}; END: ret; }}\n"
    text = text.replace("{ .reg", "{{ .reg")
    run(text.format(240, 24), "k", 1, 384, [])
    refused(text.format(240, 56), "setmaxnreg: the block's warps want 68608 registers, an SM has 65536", block=384, args=[])
    refused(text.format(240, 176), "starts with 168 at most", block=384, args=[])
    for wrong in (20, 100, 264):
        with pytest.raises(ParseError, match="a multiple of 8 from 24 to 256"):
            run(text.format(wrong, 24), "k", 1, 384, [])


@pytest.mark.parametrize("sched", [0, 1, 2])
def test_readers_that_do_not_meet(sched: int) -> None:
    """Two warps read one place at different times and tell the third, which then writes: the third knows of both."""
    body = """shr.u32 %r2, %r0, 5; setp.eq.u32 %p1, %r2, 2; @%p1 bra WRITE; setp.eq.u32 %p2, %r2, 0; @%p2 bra READ; {middle}
        READ: ld.shared.u32 %r3, [box]; mbarrier.arrive.shared.b64 _, [%r1]; bra OUT;
        WRITE: L: mbarrier.try_wait.parity.shared.b64 %p3, [%r1], 0; @!%p3 bra L; setp.ne.u32 %p4, %r0, 64; @%p4 bra OUT;
        st.shared.u32 [box], 7; OUT: st.global.u32 [%d1], 1;"""
    later = "mbarrier.try_wait.parity.shared.b64 %p3, [bar2], 1; bar.warp.sync -1;" * 3
    text = mbarrier(body.format(middle=later), 64).replace("READY: bar", "mbarrier.init.shared.b64 [bar2], 1; READY: bar")
    text = text.replace(".shared .align 4", ".shared .align 8 .b8 bar2[8]; .shared .align 4")
    run(text, "k", 1, 96, [np.zeros(1, np.uint32)], race=True, sched=sched)
    at_once = text.replace("[%r1], 0; @!%p3", "[%r1], 1; @!%p3")
    refused(at_once, "deadlock" if sched == 2 else "race: ", block=96, args=[np.zeros(1, np.uint32)], race=True, sched=sched)
