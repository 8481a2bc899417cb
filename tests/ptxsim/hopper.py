"""Kernels of a few lines for tests: a producer that copies tiles by TMA, and a warpgroup that multiplies them by wgmma.

`pipeline` is the sound kernel; a test breaks it by `edit`, which replaces one line of its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .program import LaunchReport, run
from .tensormap import tensor_map

HEAD = ".version 8.5\n.target sm_90a\n.address_size 64\n.extern .shared .align 1024 .b8 memory[];\n"
MODES = {0: 0, 128: 1, 64: 2, 32: 3}  # of a descriptor
# The warp, the lane, and the row and column that a fragment's registers begin with: lane / 4 and lane % 4.
PLACE = "shr.u32 %r30, %r0, 5; and.b32 %r31, %r0, 31; shr.u32 %r32, %r31, 2; and.b32 %r33, %r31, 3;\n"


@dataclass(frozen=True)
class Side:
    """How a matrix of 64 k lies in shared memory: `rows` (a's rows, b's columns), swizzle, whether rows are contiguous."""

    rows: int
    swizzle: int = 128
    transposed: bool = False

    @property
    def width(self) -> int:  # elements of a row of a box: of k, or of rows
        return (self.swizzle or 16) // 2

    @property
    def panel(self) -> int:  # bytes of a box
        return (64 if self.transposed else self.rows) * self.width * 2

    @property
    def boxes(self) -> int:
        return (self.rows if self.transposed else 64) // self.width

    @property
    def bytes(self) -> int:
        return self.rows * 128

    def box(self) -> list[int]:
        return [self.width, 64 if self.transposed else self.rows]

    def map(self, x: np.ndarray) -> bytes:
        return tensor_map(x, self.box(), self.swizzle)

    def descriptor(self) -> int:
        """Without the address."""
        row = self.swizzle or 16
        leading, stride = (self.panel, 8 * row) if self.transposed or not self.swizzle else (16, 8 * row)
        if self.transposed and not self.swizzle:
            leading, stride = 128, self.panel
        return leading >> 4 << 16 | stride >> 4 << 32 | MODES[self.swizzle] << 62

    def at(self, step: int) -> int:
        """Where the k of one wgmma begin, 16 * step."""
        if self.transposed:
            return step * 16 * (self.swizzle or 16)
        return step * 16 // self.width * self.panel + step * 16 % self.width * 2

    def copies(self, to: str, name: str, mbar: str, k: int) -> str:
        out = ""
        for i in range(self.boxes):
            at = f"{i * self.width}, {k}" if self.transposed else f"{k + i * self.width}, 0"
            out += f"""mov.b64 %d1, {name}; cvta.param.u64 %d2, %d1; add.u32 %r20, {to}, {i * self.panel};
                mov.u32 %r21, {at.split(", ")[0]}; mov.u32 %r22, {at.split(", ")[1]};
                cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
                    [%r20], [%d2, {{%r21, %r22}}], [{mbar}];\n"""
        return out


def _wait(mbar: str, parity: int, label: str) -> str:
    return f"""{label}:\nmbarrier.try_wait.parity.shared::cta.b64 %p1, [{mbar}], {parity};\n@!%p1 bra {label};\n"""


def _sums(n: int) -> str:
    return "{" + ", ".join(f"%s{i}" for i in range(n // 2)) + "}"


def pipeline(a: Side, b: Side, tiles: int, kind: str = "f16", registers: bool = False, stages: int = 2, scale: int = 1) -> str:
    """out[64][n] = a b, in tiles of 64 k: four warps multiply, the fifth copies. `registers`: a comes from there, plain."""
    n = b.rows
    stage = a.bytes + b.bytes
    full = stages * stage
    text = f"{HEAD}.visible .entry k(.param .align 128 .b8 ma[128], .param .align 128 .b8 mb[128],\n"
    text += ".param .u64 out, .param .u64 pa)\n"
    text += "{\n.reg .pred %p<9>; .reg .b32 %r<60>; .reg .b64 %d<20>; .reg .f32 %f<9>;\n"
    text += f".reg .f32 %s<{n // 2}>; .reg .b32 %a<{16 * tiles}>;\n"
    text += f"mov.u32 %r0, %tid.x; mov.u32 %r1, memory; add.u32 %r2, %r1, {full}; add.u32 %r3, %r2, {8 * stages};\n"
    text += "setp.ne.u32 %p2, %r0, 0; @%p2 bra READY;\n"
    for s in range(stages):
        text += f"mbarrier.init.shared::cta.b64 [%r2+{8 * s}], 1;\nmbarrier.init.shared::cta.b64 [%r3+{8 * s}], 128;\n"
    text += "fence.mbarrier_init.release.cluster;\nREADY:\nbar.sync 0;\nsetp.lt.u32 %p2, %r0, 128; @%p2 bra MULTIPLY;\n"
    text += "elect.sync _|%p3, -1; @!%p3 bra END;\n"
    for t in range(tiles):
        s = t % stages
        text += _wait(f"%r3+{8 * s}", t // stages % 2 ^ 1, f"EMPTY{t}")
        text += f"add.u32 %r4, %r2, {8 * s};\n"
        text += f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r4], {stage if not registers else b.bytes};\n"
        text += f"add.u32 %r5, %r1, {s * stage}; add.u32 %r6, %r5, {a.bytes};\n"
        text += ("" if registers else a.copies("%r5", "ma", "%r4", 64 * t)) + b.copies("%r6", "mb", "%r4", 64 * t)
    text += "bra END;\nMULTIPLY:\n"
    text += "".join(f"mov.f32 %s{i}, 0f00000000;\n" for i in range(n // 2))
    if registers:  # row = warp * 16 + lane / 4, two neighbours of k
        text += "ld.param.u64 %d5, [pa]; " + PLACE
        text += f"mad.lo.u32 %r34, %r30, 16, %r32; mul.lo.u32 %r34, %r34, {128 * tiles}; mad.lo.u32 %r34, %r33, 4, %r34;\n"
        text += "cvt.u64.u32 %d6, %r34; add.s64 %d5, %d5, %d6;\n"
        for i in range(16 * tiles):
            text += f"ld.global.b32 %a{i}, [%d5+{i // 4 * 32 + i % 2 * 8 * 128 * tiles + i // 2 % 2 * 16}];\n"
    text += "wgmma.fence.sync.aligned; // first\n"
    for t in range(tiles):
        s = t % stages
        text += _wait(f"%r2+{8 * s}", t // stages % 2, f"FULL{t}")
        for step in range(4):
            at = [f"add.u32 %r40, %r1, {s * stage + a.at(step)};", f"add.u32 %r41, %r1, {s * stage + a.bytes + b.at(step)};"]
            for i, side in enumerate((a, b)):
                text += f"{at[i]} and.b32 %r4{i}, %r4{i}, 0x3ffff; shr.u32 %r4{i}, %r4{i}, 4; cvt.u64.u32 %d1{i}, %r4{i};"
                text += f"or.b64 %d1{i}, %d1{i}, {side.descriptor():#x};\n"
            first = "{" + ", ".join(f"%a{16 * t + 4 * step + i}" for i in range(4)) + "}" if registers else "%d10"
            turned = ("" if registers else f", {int(a.transposed)}") + f", {int(b.transposed)}"
            text += (
                f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {_sums(n)}, {first}, %d11, 1, {scale}, 1{turned};\n"
            )
        text += "wgmma.commit_group.sync.aligned;\n"
        if t:
            text += "wgmma.wait_group.sync.aligned 1;\n"
            text += f"mbarrier.arrive.shared::cta.b64 _, [%r3+{8 * ((t - 1) % stages)}]; // of tile {t - 1}\n"
    text += "wgmma.wait_group.sync.aligned 0; // last\n"
    text += "ld.param.u64 %d5, [out]; " + PLACE
    text += f"""mad.lo.u32 %r34, %r30, 16, %r32; mul.lo.u32 %r34, %r34, {4 * n}; mad.lo.u32 %r34, %r33, 8, %r34;
        cvt.u64.u32 %d6, %r34; add.s64 %d5, %d5, %d6;\n"""
    for i in range(n // 2):
        text += f"st.global.f32 [%d5+{i // 4 * 32 + i // 2 % 2 * 32 * n + i % 2 * 4}], %s{i};\n"
    return text + "END:\nret;\n}\n"


def by_mma(n: int, k: int, kind: str = "f16") -> str:
    """The same sums by mma.sync, from registers that come from global memory: a [64][k], b [n][k]."""
    text = f"{HEAD}.visible .entry k(.param .u64 a, .param .u64 b, .param .u64 out)\n"
    text += f"{{\n.reg .b32 %r<20>; .reg .b64 %d<20>; .reg .f32 %s<{n // 2}>;\n"
    text += f"""ld.param.u64 %d1, [a]; ld.param.u64 %d2, [b]; ld.param.u64 %d3, [out]; mov.u32 %r0, %tid.x;
        shr.u32 %r1, %r0, 5; and.b32 %r2, %r0, 31; shr.u32 %r3, %r2, 2; and.b32 %r4, %r2, 3;
        mad.lo.u32 %r5, %r1, 16, %r3; mul.lo.u32 %r6, %r5, {2 * k}; mad.lo.u32 %r6, %r4, 4, %r6; cvt.u64.u32 %d4, %r6;
        add.s64 %d1, %d1, %d4; mul.lo.u32 %r7, %r3, {2 * k}; mad.lo.u32 %r7, %r4, 4, %r7; cvt.u64.u32 %d5, %r7;
        add.s64 %d2, %d2, %d5; mul.lo.u32 %r8, %r5, {4 * n}; mad.lo.u32 %r8, %r4, 8, %r8; cvt.u64.u32 %d6, %r8;
        add.s64 %d3, %d3, %d6;\n"""
    text += "".join(f"mov.f32 %s{i}, 0f00000000;\n" for i in range(n // 2))
    for k0 in range(0, k, 16):
        for i in range(4):
            text += f"ld.global.b32 %r1{i}, [%d1+{2 * k0 + i % 2 * 16 * k + i // 2 * 16}];\n"
        for j in range(n // 8):
            for i in range(2):
                text += f"ld.global.b32 %r1{4 + i}, [%d2+{2 * k0 + 16 * k * j + 16 * i}];\n"
            d = "{" + ", ".join(f"%s{4 * j + i}" for i in range(4)) + "}"
            text += f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {d},\n"
            text += f"{{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {d};\n"
    for i in range(n // 2):
        text += f"st.global.f32 [%d3+{i // 4 * 32 + i // 2 % 2 * 32 * n + i % 2 * 4}], %s{i};\n"
    return text + "ret;\n}\n"


def halves(x: np.ndarray, kind: str) -> np.ndarray:
    """float32 values, exact in bfloat16 too, as the bits of a format of 16 bits."""
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def edited(text: str, edit: Sequence[str] | None) -> str:
    if edit is None:
        return text
    old, new = edit
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the kernel"
    return text.replace(old, new)


def multiply(
    x: np.ndarray, y: np.ndarray, a: Side, b: Side, *, kind: str = "f16", registers: bool = False, stages: int = 2,
    edit: Sequence[str] | None = None, every: Sequence[str] | None = None, **options: Any,
) -> tuple[np.ndarray, LaunchReport]:  # fmt: skip
    """The product of x [64][k] and y [n][k], float32 values, by `pipeline`; `every` replaces a text wherever it stands."""
    xs, ys = halves(x, kind), halves(y, kind)
    xt, yt = (np.ascontiguousarray(v.T) if side.transposed else v for v, side in ((xs, a), (ys, b)))
    out = np.full((64, len(y)), np.nan, np.float32)
    tiles = -(-x.shape[1] // 64)
    text = edited(pipeline(a, b, tiles, kind, registers, stages), edit)
    text = text.replace(*every) if every else text
    shared = stages * (a.bytes + b.bytes) + 16 * stages
    memory = [(v.ctypes.data, v.nbytes, False, name) for v, name in ((xt, "a"), (yt, "b"))]
    report = run(text, "k", 1, 160, [a.map(xt), b.map(yt), out, xs], shared, memory=memory, **options)
    return out, report
