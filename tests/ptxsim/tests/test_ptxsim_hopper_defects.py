"""Pipelines of tensor copies and wgmma with one defect each, which the PTX simulator must refuse by name; and sound twins."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from ptxsim.hopper import HEAD, Side, multiply
from ptxsim.program import SimulatorError, run
from ptxsim.snippets import refused
from ptxsim.tensormap import tensor_map

A, B = Side(64), Side(8)
K = 448  # seven tiles through two stages
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((64, K)).astype(np.float32), RNG.standard_normal((8, K)).astype(np.float32)
STAGE = A.bytes + B.bytes
CHANGED = "has changed while a wgmma was to read it"
ZEROED = """@!%p1 bra FULL0;
    shl.b32 %r50, %r0, 2; add.u32 %r50, %r50, %r1; st.shared.b32 [%r50+8192], 0;
    fence.proxy.async.shared::cta;
    bar.sync 1, 128; // zeroed
"""


def both(old: str, new: str) -> dict[str, Any]:
    return {"edit": (old, new)}


def wait(mbar: str, parity: int, label: str) -> str:
    return f"{label}:\nmbarrier.try_wait.parity.shared::cta.b64 %p1, [{mbar}], {parity};\n@!%p1 bra {label};\n"


DEFECTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no wait for a tile": (both(wait("%r2+8", 0, "FULL1"), ""), (CHANGED, "race: ", "under way")),
    "three warps that do not wait for a tile": (
        both(wait("%r2+8", 0, "FULL1"), "setp.ge.u32 %p4, %r0, 32;\n@%p4 bra SKIP;\n" + wait("%r2+8", 0, "FULL1") + "SKIP:\n"),
        (CHANGED, "race: ", "under way"),
    ),
    "a wait for the wrong parity": (
        both(wait("%r2+0", 1, "FULL2"), wait("%r2+0", 0, "FULL2")),
        (CHANGED, "race: ", "under way"),
    ),
    "a producer that does not wait": (
        both(wait("%r3+0", 0, "EMPTY2"), ""),
        ("more arrivals at the mbarrier", CHANGED, "race: ", "deadlock"),
    ),
    "a producer with the wrong parity": (
        both(wait("%r3+0", 0, "EMPTY2"), wait("%r3+0", 1, "EMPTY2")),
        ("more arrivals at the mbarrier", CHANGED, "race: ", "deadlock"),
    ),
    "a stage released before its wgmmas were waited for": (
        both(
            "wgmma.wait_group.sync.aligned 1;\nmbarrier.arrive.shared::cta.b64 _, [%r3+0]; // of tile 0\n",
            "mbarrier.arrive.shared::cta.b64 _, [%r3+0];\nwgmma.wait_group.sync.aligned 1;\n",
        ),
        (CHANGED, "after its read by a wgmma of warpgroup 0"),
    ),
    "a wait that leaves one group too many": (
        both(
            "wgmma.wait_group.sync.aligned 1;\nmbarrier.arrive.shared::cta.b64 _, [%r3+0]; // of tile 0\n",
            "wgmma.wait_group.sync.aligned 2;\nmbarrier.arrive.shared::cta.b64 _, [%r3+0];\n",
        ),
        (CHANGED,),
    ),
    "too many bytes announced": (
        {"every": (f"[%r4], {STAGE};", f"[%r4], {STAGE + 16};")},
        ("deadlock", "waits for an mbarrier at shared+", "0 of 1 arrivals and 16 bytes are missing"),
    ),
    "too few bytes announced": (
        {"every": (f"[%r4], {STAGE};", f"[%r4], {STAGE - 16};")},
        ("deadlock", "waits for an mbarrier at shared+", "0 of 1 arrivals and -16 bytes are missing"),
    ),
    "an mbarrier for too many arrivals": (
        both("[%r3+0], 128;", "[%r3+0], 129;"),
        ("deadlock", "1 of 129 arrivals and 0 bytes are missing"),
    ),
    "an mbarrier for too few arrivals": (
        both("[%r3+0], 128;", "[%r3+0], 32;"),
        (CHANGED, "race: ", "more arrivals at the mbarrier", "deadlock"),
    ),
    "an mbarrier that copies do not know of": (
        both("fence.mbarrier_init.release.cluster;\n", ""),
        ("was initialised without a fence",),
    ),
    "an mbarrier that other threads do not know of": (
        both("READY:\nbar.sync 0;\n", "READY:\n"),
        ("is no mbarrier: nobody has initialised it", "race: "),
    ),
    "no wgmma.fence": (
        both("wgmma.fence.sync.aligned; // first\n", ""),
        ("written after the last wgmma.fence (or before the first)",),
    ),
    "sums that are changed after the fence": (
        both("wgmma.fence.sync.aligned; // first\n", "wgmma.fence.sync.aligned;\nmov.f32 %s3, 0f00000000;\n"),
        ("written after the last wgmma.fence",),
    ),
    "sums that are read before the wait": (
        both("wgmma.wait_group.sync.aligned 0; // last\n", ""),
        ("read of a register that a wgmma in flight adds to", "st.global.f32 [%d5+0], %s0"),
    ),
    "sums that are written before the wait": (
        both("wgmma.wait_group.sync.aligned 0; // last\n", "mov.f32 %s1, %f1;\nwgmma.wait_group.sync.aligned 0;\n"),
        ("write of a register that a wgmma in flight adds to", "mov.f32 %s1"),
    ),
    "a wgmma that is not committed": (
        {"every": ("wgmma.commit_group.sync.aligned;\n", "")},
        ("read of a register that a wgmma in flight adds to",),
    ),
    "a warp that skips a wgmma": (
        both("FULL3:\n", "setp.ge.u32 %p4, %r0, 96;\n@%p4 bra FULL4;\nFULL3:\n"),
        ("issue different wgmmas", "deadlock", "more arrivals"),
    ),
    "a descriptor of another place for one warp": (
        both("FULL3:\n", "shr.u32 %r51, %r0, 5; setp.eq.u32 %p4, %r51, 2; @%p4 add.u32 %r1, %r1, 32;\nFULL3:\n"),
        ("issue different wgmmas",),
    ),
    "stores that a wgmma has not been told of": (
        both("@!%p1 bra FULL0;\n", ZEROED.replace("fence.proxy.async.shared::cta;", "")),
        ("wgmma reads shared+",),
    ),
    "stores that a copy has not been told of": (
        both(
            "mbarrier.arrive.shared::cta.b64 _, [%r3+0]; // of tile 0\n",
            "mad.lo.u32 %r50, %r0, 4, %r1;\nst.shared.b32 [%r50], 0;\nmbarrier.arrive.shared::cta.b64 _, [%r3+0];\n",
        ),
        ("a bulk copy over shared+",),
    ),
    "stores that other warps do not wait for": (
        both("@!%p1 bra FULL0;\n", ZEROED.replace("bar.sync 1, 128; // zeroed", "")),
        ("race: ", CHANGED, "with no fence.proxy.async between"),
    ),
    "stores into an mbarrier": (
        both("FULL3:\n", "st.shared.b32 [%r2+4], 7;\nFULL3:\n"),
        ("a write to shared+", "which is part of an mbarrier"),
    ),
    "stores into what a copy brings": (
        both("FULL0:\n", "st.shared.b32 [%r1], 0;\nFULL0:\n"),
        ("race: ", "under way", "with no fence.proxy.async between"),
    ),
    "a warp that ends too early": (
        both("FULL6:\n", "bra END;\nFULL6:\n"),
        ("the warp ends before it has waited for its wgmma",),
    ),
}


def test_the_sound_kernel() -> None:
    for sched in (0, 1, 2):
        got, _ = multiply(X, Y, A, B, sched=sched, race=True, lazy_async=True)
        assert np.allclose(got, X.astype(float) @ Y.T.astype(float), atol=0.05)
        zeroed = Y.copy()
        zeroed[:4, :64] = 0
        want, _ = multiply(X, zeroed, A, B, sched=sched)
        got, _ = multiply(X, Y, A, B, edit=("@!%p1 bra FULL0;\n", ZEROED), sched=sched, race=True, lazy_async=True)
        assert (got == want).all()


@pytest.mark.parametrize("sched", [0, 1, 2])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_named(defect: str, sched: int, lazy: bool) -> None:
    change, names = DEFECTS[defect]
    with pytest.raises(SimulatorError) as e:
        multiply(X, Y, A, B, sched=sched, seed=3, race=True, lazy_async=lazy, **change)
    assert any(name in str(e.value) for name in names) and "PTX line" in str(e.value), str(e.value)


def test_a_copy_that_nobody_waits_for() -> None:
    edit = ("FULL6:\n", "wgmma.wait_group.sync.aligned 0;\nbra END;\nFULL6:\n")
    with pytest.raises(SimulatorError, match="the block has ended before a bulk copy to shared"):
        multiply(X, Y, A, B, edit=edit, lazy_async=True)


@pytest.mark.parametrize("swizzle", [64, 32, 0])
def test_a_wrong_layout_gives_wrong_numbers(swizzle: int) -> None:
    """A descriptor that does not tell how the copies have laid the matrix out: its mode, or its strides."""
    right, _ = multiply(X, Y, A, B)
    said, other = (f"{side.descriptor():#x};" for side in (B, Side(8, swizzle)))
    wrong, _ = multiply(X, Y, A, B, every=(said, other))
    assert not np.array_equal(wrong, right)


def test_what_a_descriptor_may_not_be() -> None:
    good = B.descriptor()
    for bad, name in (
        (good | 1 << 46, "a bit is set that means nothing"),
        ((good | 1 << 49) & ~(3 << 62), "a base offset without a swizzle"),
        (good | 0x3FFF, "out-of-bounds matrix b"),
    ):
        with pytest.raises(SimulatorError, match=name):
            multiply(X, Y, Side(64, 64), B, every=(f"{good:#x};", f"{bad:#x};"))


# ---- tensor copies


COPY = f"""{HEAD}.visible .entry k(.param .align 64 .b8 m[192], .param .u64 out)
    {{{{ .reg .b32 %r<9>; .reg .b64 %d<9>; .shared .align 8 .b8 bar[8]; mov.u32 %r1, memory; mov.u32 %r2, 0;
    mov.b64 %d1, m; cvta.param.u64 %d1, %d1; mbarrier.init.shared.b64 [bar], 1; fence.mbarrier_init.release.cluster;
    {{}}; ret; }}}}""".replace("; ", ";\n")
ISSUE = "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r1], [%d1, {%r2, %r2}], [bar]"


@pytest.mark.parametrize(
    ("code", "map_of", "name"),
    [
        ("add.u32 %r1, %r1, 64; " + ISSUE, {}, "a bulk copy to shared.1088, not a multiple of 128"),
        ("add.u32 %r1, %r1, 128; " + ISSUE, {}, "out-of-bounds bulk copy of 1024 bytes to shared.1152 of a block with 2048"),
        (ISSUE.replace("2d", "3d").replace("{%r2,", "{%r2, %r2,"), {}, "a copy of 3 dimensions with a tensor map of 2"),
        ("add.s64 %d1, %d1, 64; " + ISSUE, {}, "no tensor map"),
        (ISSUE.replace("[bar]", "[bar+8]"), {}, "shared.8 is no mbarrier"),
        (ISSUE, {"swizzle": 64}, "rows of 128 bytes with a swizzle of 64 bytes"),
        ("mov.u32 %r3, 1; " + ISSUE.replace("r2}", "r3}"), {"shape": [64, 9]}, "out-of-bounds load of 128 bytes at x.1024"),
        ("mbarrier.inval.shared.b64 [bar]; " + ISSUE, {}, "is no mbarrier"),
        ("mbarrier.init.shared.b64 [bar], 1", {}, "is an mbarrier already"),
        ("mbarrier.init.shared.b64 [bar+4], 1", {}, "misaligned"),
        ("mbarrier.expect_tx.shared.b64 [bar], 1048576", {}, "beyond what it can count"),
    ],
)  # fmt: skip
def test_copies_that_are_refused(code: str, map_of: dict[str, Any], name: str) -> None:
    x = np.zeros((8, 64), np.uint16)
    maps = [tensor_map(x, [64, 8], **map_of) + bytes(64), 0]
    with pytest.raises(SimulatorError, match=name):
        text = COPY.format(code.replace("; ", ";\n"))
        run(text, "k", 1, 1, maps, 1024, memory=[(x.ctypes.data, x.nbytes, False, "x")])


# ---- mbarriers


def test_who_waits_for_ever_is_named() -> None:
    text = f"""{HEAD}.visible .entry k() {{{{ .reg .pred %p<3>; .reg .b32 %r<5>; .shared .align 8 .b8 bar[16];
        mov.u32 %r0, %tid.x; setp.ne.u32 %p1, %r0, 0;
        @%p1 bra READY; mbarrier.init.shared.b64 [bar], 2; mbarrier.init.shared.b64 [bar+8], 1;
        READY: bar.sync 0; @%p1 bra NEXT; mbarrier.arrive.shared.b64 _, [bar]; NEXT: setp.ge.u32 %p1, %r0, 32; @%p1 bra OTHER;
        A: mbarrier.try_wait.parity.shared.b64 %p2, [bar], 0; @!%p2 bra A;
        OTHER: mbarrier.{{}}.parity.shared.b64 %p2, [bar+8], 0; @!%p2 bra OTHER; ret; }}}}""".replace("; ", ";\n")
    for sched in (0, 1, 2):
        said = refused(text.format("try_wait"), "deadlock in block (0,0,0)", block=64, args=[], sched=sched)
        assert re.search(r"warp 0, lanes 0x\w+: waits for an mbarrier at shared.0, phase 0: 1 of 2 arrivals and 0 bytes", said)
        assert re.search(r"warp 1, lanes 0x\w+: waits for an mbarrier at shared.8, phase 0: 1 of 1 arrivals and 0 bytes", said)
        said = refused(text.format("test_wait"), "deadlock in block (0,0,0)", "polls", block=64, args=[], sched=sched)


def test_mbarriers_that_are_refused() -> None:
    body = "mbarrier.init.shared.b64 [bar], {}; {}; ret; }}"
    text = f"{HEAD}.visible .entry k() {{{{ .reg .pred %p<3>; .reg .b32 %r<5>; .shared .align 8 .b8 bar[16];\n" + body
    for count, code, name in (
        (0, "", "an mbarrier for 0 arrivals"),
        (1 << 20, "", "an mbarrier for 1048576 arrivals"),
        (1, "mbarrier.arrive.shared.b64 _, [bar], 2", "more arrivals at the mbarrier at shared+0 than the 1 of its phase"),
        (1, "mbarrier.try_wait.parity.shared.b64 %p1, [bar], 2", "parity is 0 or 1, not 2"),
        (1, "mbarrier.arrive.shared.b64 _, [bar+8]", "shared+8 is no mbarrier"),
    ):
        refused(text.format(count, code).replace("; ", ";\n"), name, block=1, args=[])
