"""The PTX simulator's machine: memory, divergence, calls, collectives, copies, matrices, atomics; and what nvcc makes."""

from __future__ import annotations

import inspect
import math
import random
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from ptxsim import decode, parse
from ptxsim.open_bits import open_bits
from ptxsim.program import Module, run
from ptxsim.snippets import HEAD, REGISTERS, kernel, refused, rounded, same, signed

# ---- memory


def test_vectors_and_narrow_loads() -> None:
    data = np.arange(64 * 16, dtype=np.uint8) * 37
    out = np.zeros((64, 8), np.int32)
    body = """
        shl.b32 %r1, %r0, 4; cvt.u64.u32 %d10, %r1; add.s64 %d11, %d1, %d10; add.s64 %d12, %d2, %d10;
        add.s64 %d12, %d12, %d10;
        ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%d11];
        ld.global.s8 %r14, [%d11+3]; ld.global.u8 %r15, [%d11+3]; ld.global.s16 %r16, [%d11+6];
        ld.global.nc.u16 %r17, [%d11+6];
        st.global.v4.u32 [%d12], {%r10, %r11, %r12, %r13}; st.global.v2.u32 [%d12+16], {%r14, %r15};
        st.global.v2.b32 [%d12+24], {%r16, %r17};"""
    run(kernel(body, 2), "k", 1, 64, [data, out])
    rows = data.reshape(64, 16)
    assert (out[:, :4] == rows.copy().view(np.int32)).all()
    assert (out[:, 4] == rows[:, 3].view(np.int8)).all() and (out[:, 5] == rows[:, 3]).all()
    assert (out[:, 6] == rows.copy().view(np.int16)[:, 3]).all() and (out[:, 7] == rows.copy().view(np.uint16)[:, 3]).all()


def test_spaces_and_generic_addresses() -> None:
    """Shared (static and dynamic), local, const and global memory, by name and by generic address."""
    out = np.zeros((64, 6), np.uint32)
    before = """.const .align 4 .u32 table[4] = {11, 22, 33, 44};
        .global .align 8 .u64 where[2] = {table, generic(table)+8};
        .extern .shared .align 16 .b8 dynamic[];
        """
    body = """
        .shared .align 4 .b8 fixed[256]; .local .align 8 .b8 frame[16];
        shl.b32 %r1, %r0, 2; mov.u32 %r2, fixed; add.u32 %r2, %r2, %r1; add.u32 %r3, %r0, 100; st.shared.u32 [%r2], %r3;
        mov.u32 %r4, dynamic; add.u32 %r4, %r4, %r1; add.u32 %r5, %r0, 200; st.shared.u32 [%r4], %r5;
        mov.u64 %d10, frame; cvta.local.u64 %d11, %d10; add.u32 %r6, %r0, 300; st.u32 [%d11+4], %r6;
        ld.local.u32 %r7, [%d10+4];
        bar.sync 0;
        xor.b32 %r8, %r1, 252; mov.u64 %d12, fixed; cvta.shared.u64 %d12, %d12; cvt.u64.u32 %d13, %r8;
        add.s64 %d12, %d12, %d13; ld.u32 %r9, [%d12];
        mov.u32 %r10, dynamic; add.u32 %r10, %r10, %r8; ld.shared.u32 %r11, [%r10];
        and.b32 %r12, %r0, 3; mul.wide.u32 %d14, %r12, 4; mov.u64 %d15, table; add.s64 %d15, %d15, %d14;
        ld.const.u32 %r13, [%d15];
        ld.global.u64 %d16, [where+8]; ld.u32 %r14, [%d16];
        isspacep.shared %p1, %d12; isspacep.local %p2, %d12; selp.u32 %r15, 1, 0, %p1; selp.u32 %r16, 2, 0, %p2;
        or.b32 %r15, %r15, %r16;
        mad.wide.u32 %d20, %r0, 24, %d1;
        st.global.u32 [%d20], %r7; st.global.u32 [%d20+4], %r9; st.global.u32 [%d20+8], %r11; st.global.u32 [%d20+12], %r13;
        st.global.u32 [%d20+16], %r14; st.global.u32 [%d20+20], %r15;"""
    for sched in (0, 1, 2):
        run(kernel(body, 1, before), "k", 1, 64, [out], shared=256, sched=sched, race=True)
        t = np.arange(64)
        want = np.stack(
            [t + 300, 100 + 63 - t, 200 + 63 - t, np.array([11, 22, 33, 44])[t % 4], np.full(64, 33), np.ones(64)], 1
        )
        assert (out == want).all()


def test_parameters_of_all_sizes() -> None:
    text = f"""{HEAD}.visible .entry
    k(.param .u64 .ptr .global .align 4 o, .param .u8 a, .param .align 8 .b8 s[24], .param .f32 x)
    {{ {REGISTERS} ld.param.u64 %d1, [o]; ld.param.u8 %r1, [a]; ld.param.u32 %r2, [s+4]; mov.b64 %d2, s;
    ld.param.u32 %r3, [%d2+16];
       ld.param.f32 %f1, [x]; st.global.u32 [%d1], %r1; st.global.u32 [%d1+4], %r2; st.global.u32 [%d1+8], %r3;
       st.global.f32 [%d1+12], %f1; ret; }}"""
    k = Module(text).kernel("k")
    assert [(p.offset, p.size) for p in k.params] == [(0, 8), (8, 1), (16, 24), (40, 4)]
    out = np.zeros(4, np.uint32)
    run(text, "k", 1, 1, [out, 200, np.arange(6, dtype=np.uint32).tobytes(), 1.5])
    assert out.tolist() == [200, 1, 4, 0x3FC00000]


# ---- divergence, calls


@pytest.mark.parametrize("sched", [0, 1, 2])
def test_loops_of_different_length(sched: int) -> None:
    """Collatz: every lane its own number of steps, a branch inside the loop."""
    body = """
        mad.lo.s32 %r1, %r0, 7, 1; mov.u32 %r2, 0;
        LOOP: setp.le.u32 %p1, %r1, 1; @%p1 bra DONE;
        and.b32 %r3, %r1, 1; setp.eq.u32 %p2, %r3, 0; @%p2 bra EVEN;
        mad.lo.u32 %r1, %r1, 3, 1; bra NEXT;
        EVEN: shr.u32 %r1, %r1, 1;
        NEXT: add.u32 %r2, %r2, 1; bra LOOP;
        DONE: mad.wide.u32 %d5, %r0, 4, %d1; st.global.u32 [%d5], %r2;"""
    out = np.zeros(70, np.uint32)
    run(kernel(body, 1), "k", 1, 70, [out], sched=sched, seed=5)

    def steps(n: int) -> int:
        count = 0
        while n > 1:
            n, count = (3 * n + 1 if n % 2 else n // 2), count + 1
        return count

    assert out.tolist() == [steps(7 * t + 1) for t in range(70)]


@pytest.mark.parametrize("sched", [0, 1, 2])
def test_branch_table_and_calls(sched: int) -> None:
    before = """.func (.param .b32 result) twice_plus(.param .b32 x, .param .b32 y)
    { .reg .b32 %r<9>; .reg .pred %p1; ld.param.u32 %r1, [x]; ld.param.u32 %r2, [y]; setp.gt.u32 %p1, %r1, 5; @%p1 bra BIG;
      mad.lo.u32 %r3, %r1, 2, %r2; st.param.b32 [result], %r3; ret; BIG: st.param.b32 [result], %r1; ret; }"""
    body = """
        and.b32 %r1, %r0, 3; TABLE: .branchtargets A, B, C, A;
        brx.idx %r1, TABLE;
        A: mov.u32 %r2, 10; bra JOIN; B: mov.u32 %r2, 20; bra JOIN; C: mov.u32 %r2, 30; bra JOIN;
        JOIN: { .param .b32 p0; .param .b32 p1; .param .b32 q; st.param.b32 [p0], %r0; st.param.b32 [p1], %r2;
        call.uni (q), twice_plus, (p0, p1); ld.param.b32 %r3, [q]; }
        mad.wide.u32 %d5, %r0, 4, %d1; st.global.u32 [%d5], %r3;"""
    out = np.zeros(32, np.uint32)
    run(kernel(body, 1, before), "k", 1, 32, [out], sched=sched)
    assert out.tolist() == [t if t > 5 else 2 * t + [10, 20, 30, 10][t % 4] for t in range(32)]


def labels_found() -> list[int]:
    """Two loops side by side, then one in another and a branch out of braces that have no such label: four counts."""
    body = """
        mov.u32 %r1, 0; mov.u32 %r2, 0; mov.u32 %r3, 0; mov.u32 %r4, 0;
        { AGAIN: add.u32 %r1, %r1, 1; setp.lt.u32 %p1, %r1, 5; @%p1 bra AGAIN; }
        { AGAIN: add.u32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, 3; @%p1 bra.uni AGAIN; }
        { AGAIN: add.u32 %r3, %r3, 1;
          { AGAIN: add.u32 %r4, %r4, 1; setp.lt.u32 %p1, %r4, 4; @%p1 bra AGAIN; }
          { setp.lt.u32 %p1, %r4, 5; @%p1 bra AGAIN; } }
        st.global.v4.u32 [%d1], {%r1, %r2, %r3, %r4};"""
    out = np.zeros(4, np.uint32)
    k = Module(kernel(body, 1)).kernel("k")  # run() would keep what it parsed, and a mutant would not be asked
    params, memory = k.pack([out])
    k.launch([1, 1, 1], [1, 1, 1], params, 0, memory)
    return out.tolist()


def test_a_label_belongs_to_the_braces_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert labels_found() == [5, 3, 2, 5]
    twice = "{ SIDE: mov.u32 %r1, 0; } { SIDE: mov.u32 %r1, 1; }"
    run(kernel(f"{twice} mov.u32 %r2, 2;", 1), "k", 1, 1, [None])
    refused(kernel(f"{twice} bra SIDE;", 1), "no label SIDE")

    source = inspect.getsource(parse.statements)
    for old, new in (("if all(count == 1 for count in labels.values()):", "if True:"), ("reversed(at)", "at")):
        assert source.count(old) == 1
        mutant = dict(vars(parse))
        exec(source.replace(old, new), mutant)
        monkeypatch.setattr(decode, "statements", mutant["statements"])
        assert labels_found() != [5, 3, 2, 5], f"the control: {new}"


def test_random_programs() -> None:
    """Straight-line integer code with forward branches against the same program in Python: liveness, cells, divergence."""
    for seed in range(12):
        rng = random.Random(seed)
        lines, model = [], []
        live = [f"%r{i}" for i in range(1, 6)]
        for i in range(120):
            d = f"%r{rng.randint(1, 50)}"
            a, b = rng.choice(live), rng.choice([*live, str(rng.randint(0, 1000))])
            op = rng.choice(["add.u32", "sub.u32", "mul.lo.u32", "xor.b32", "and.b32", "or.b32", "min.u32", "max.s32"])
            if rng.random() < 0.15 and i < 110:
                skip = rng.randint(1, 9)
                lines.append(f"setp.lt.u32 %p1, {a}, {b}; @%p1 bra L{i + skip};")
                model.append(("skip", a, b, i + skip))
            else:
                guard = rng.random() < 0.2
                lines.append((f"setp.gt.s32 %p2, {a}, {b}; @!%p2 " if guard else "") + f"{op} {d}, {a}, {b};")
                model.append((op, a, b, d, guard))
                if d not in live:
                    live.append(d)
        text = "".join(f"L{i}: {line}\n" for i, line in enumerate(lines))
        start = "".join(f"mad.lo.u32 %r{i}, %r0, {rng.randint(1, 99)}, {rng.randint(0, 9)};\n" for i in range(1, 51))
        scale = [(int(w.split(",")[2]), int(w.split(",")[3].split(";")[0])) for w in start.splitlines()]
        ends = "".join(f"st.global.u32 [%d5+{4 * i}], %r{i};\n" for i in range(1, 51))
        out = np.zeros((48, 51), np.uint32)
        body = f"{start}{text}L{len(lines)}: mad.wide.u32 %d5, %r0, 204, %d1;\n{ends}"
        body += "".join(f"L{i}: " for i in range(len(lines) + 1, len(lines) + 9))
        for sched in range(3):
            out[:] = 0
            run(kernel(body, 1), "k", 1, 48, [out], sched=sched, seed=seed)
            for t in range(48):
                reg = {f"%r{i}": t * m + c & 0xFFFFFFFF for i, (m, c) in enumerate(scale, 1)}
                at = 0
                while at < len(model):
                    step = model[at]
                    a, b = (reg[v] if v[0] == "%" else int(v) for v in step[1:3])
                    at += 1
                    if step[0] == "skip":
                        at = step[3] if a < b else at
                        continue
                    if step[4] and signed(a, 32) > signed(b, 32):
                        continue
                    operation = {
                        **{"add": int.__add__, "sub": int.__sub__, "mul": int.__mul__, "xor": int.__xor__, "and": int.__and__},
                        **{"or": int.__or__, "min": min, "max": lambda p, q: max(signed(p, 32), signed(q, 32))},
                    }[step[0].split(".")[0]]
                    value = operation(a, b)
                    reg[step[3]] = value & 0xFFFFFFFF
                assert out[t, 1:].tolist() == [reg[f"%r{i}"] for i in range(1, 51)], (seed, sched, t)


# ---- collectives


def shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The PTX ISA's pseudo-code."""
    segment, clamp, b = c >> 8 & 31, c & 31, b & 31
    top, bottom = lane & segment | clamp & ~segment & 31, lane & segment
    j, inside = {
        "up": (lane - b, lane - b >= top), "down": (lane + b, lane + b <= top), "bfly": (lane ^ b, lane ^ b <= top),
        "idx": (bottom | b & ~segment & 31, (bottom | b & ~segment & 31) <= top),
    }[mode]  # fmt: skip
    return (j, True) if inside else (lane, False)


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode: str) -> None:
    for b, c in ((1, 0x1F), (3, 0x1F), (5, 0x181F), (16, 0x1F), (1, 0), (2, 0x1C03)):
        out = np.zeros((32, 2), np.uint32)
        body = f"""mul.lo.u32 %r1, %r0, 3; shfl.sync.{mode}.b32 %r2|%p1, %r1, {b}, {c}, -1; selp.u32 %r3, 1, 0, %p1;
            mad.wide.u32 %d5, %r0, 8, %d1; st.global.v2.u32 [%d5], {{%r2, %r3}};"""
        run(kernel(body, 1), "k", 1, 32, [out])
        want = [shuffled(mode, lane, b, c) for lane in range(32)]
        assert out.tolist() == [[3 * j, int(p)] for j, p in want]


@pytest.mark.parametrize("sched", [0, 1, 2])
def test_collectives_of_part_of_a_warp(sched: int) -> None:
    """Odd and even lanes go different ways and vote, match and reduce among themselves."""
    out = np.zeros((32, 6), np.uint32)
    half = """
        setp.gt.u32 %p2, %r0, 20; vote.sync.ballot.b32 %r10, %p2, {m}; vote.sync.any.pred %p3, %p2, {m};
        vote.sync.all.pred %p4, !%p2, {m};
        selp.u32 %r11, 1, 0, %p3; selp.u32 %r12, 2, 0, %p4; or.b32 %r11, %r11, %r12;
        shr.u32 %r13, %r0, 2; match.any.sync.b32 %r14, %r13, {m}; redux.sync.add.s32 %r15, %r0, {m};
        redux.sync.max.u32 %r16, %r0, {m};
        elect.sync %r17|%p5, {m};"""
    body = f"""
        and.b32 %r1, %r0, 1; setp.eq.u32 %p1, %r1, 0; @%p1 bra EVEN;
        {half.format(m="0xaaaaaaaa")} bra JOIN;
        EVEN: {half.format(m="0x55555555")}
        JOIN: mad.wide.u32 %d5, %r0, 24, %d1;
        st.global.v2.u32 [%d5], {{%r10, %r11}}; st.global.v2.u32 [%d5+8], {{%r14, %r15}};
        st.global.v2.u32 [%d5+16], {{%r16, %r17}};"""
    run(kernel(body, 1), "k", 1, 32, [out], sched=sched)
    for lane in range(32):
        mine = [j for j in range(32) if j % 2 == lane % 2]
        ballot = sum(1 << j for j in mine if j > 20)
        match = sum(1 << j for j in mine if j // 4 == lane // 4)
        assert out[lane].tolist() == [ballot, 1, match, sum(mine), mine[-1], mine[0]]


@pytest.mark.parametrize("sched", [0, 1, 2])
def test_barriers(sched: int) -> None:
    """Two named barriers between a producing and a consuming warp, a reduction over the block, threads that left before."""
    body = """
        .shared .align 4 .b8 box[256];
        setp.ge.u32 %p1, %r0, 96; @%p1 bra OUT;
        setp.ge.u32 %p2, %r0, 64; @%p2 bra REST;
        setp.ge.u32 %p3, %r0, 32; @%p3 bra CONSUME;
        shl.b32 %r2, %r0, 2; mov.u32 %r3, box; add.u32 %r3, %r3, %r2; add.u32 %r4, %r0, 7; st.shared.u32 [%r3], %r4;
        bar.arrive 1, 64; bar.sync 2, 64; bra REST;
        CONSUME: bar.sync 1, 64; sub.u32 %r5, 63, %r0; shl.b32 %r5, %r5, 2; mov.u32 %r3, box; add.u32 %r3, %r3, %r5;
        ld.shared.u32 %r6, [%r3];
        mad.wide.u32 %d5, %r0, 4, %d1; st.global.u32 [%d5], %r6; bar.sync 2, 64;
        REST: setp.lt.u32 %p4, %r0, 5; bar.red.popc.u32 %r7, 0, %p4; bar.red.or.pred %p5, 0, %p4;
        @!%p5 bra OUT; mad.wide.u32 %d6, %r0, 4, %d2; st.global.u32 [%d6], %r7;
        OUT:"""
    a, b = np.zeros(128, np.uint32), np.zeros(128, np.uint32)
    run(kernel(body, 2), "k", 1, 128, [a, b], sched=sched, race=True)
    assert a[32:64].tolist() == [31 - i + 7 for i in range(32)] and b[:96].tolist() == [5] * 96 and not b[96:].any()


# ---- matrices


def mma(
    shape: str, types: str, counts: tuple[int, int, int], a: np.ndarray, b: np.ndarray, c: np.ndarray, model: int
) -> np.ndarray:
    """One warp: fragments come as [32, registers] of u32, in and out."""
    na, nb, nc = counts
    register = lambda base, n: "{" + ", ".join(f"%r{base + i}" for i in range(n)) + "}"  # noqa: E731
    body = "".join(f"mad.wide.u32 %d{10 + i}, %r0, {4 * n}, %d{i + 1};\n" for i, n in enumerate((na, nb, nc, nc)))
    for i, (base, n) in enumerate(((10, na), (20, nb), (30, nc))):
        body += "".join(f"ld.global.b32 %r{base + k}, [%d{10 + i}+{4 * k}];\n" for k in range(n))
    operands = ", ".join(register(base, n) for base, n in ((40, nc), (10, na), (20, nb), (30, nc)))
    body += f"mma.sync.aligned.{shape}.row.col.{types} {operands};\n"
    body += "".join(f"st.global.b32 [%d13+{4 * k}], %r{40 + k};\n" for k in range(nc))
    out = np.zeros((32, nc), np.uint32)
    run(kernel(body, 4), "k", 1, 32, [a, b, c, out], mma=model)
    return out


def fragments(x: np.ndarray, y: np.ndarray, each: int) -> tuple[np.ndarray, np.ndarray]:
    """A [16, K] and B [K, 8], unsigned integers of 32 / each bits, to registers as the ISA's figures of mma.m16n8k* have it."""
    k = x.shape[1]
    chunks = k // (4 * each)
    a, b = np.zeros((32, 2 * chunks), np.uint32), np.zeros((32, chunks), np.uint32)
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for q in range(chunks):
            for e in range(each):
                col = q * 4 * each + t * each + e
                shift = 32 // each * e
                a[lane, 2 * q] |= np.uint32(int(x[g, col]) << shift)
                a[lane, 2 * q + 1] |= np.uint32(int(x[g + 8, col]) << shift)
                b[lane, q] |= np.uint32(int(y[col, g]) << shift)
    return a, b


def scattered(c: np.ndarray) -> np.ndarray:
    """C [16, 8] to four registers a lane, and back by the inverse."""
    return np.array([[c[g, 2 * t], c[g, 2 * t + 1], c[g + 8, 2 * t], c[g + 8, 2 * t + 1]] for g in range(8) for t in range(4)])


@pytest.mark.parametrize(
    ("types", "k"),
    [
        *(("f32.f16.f16.f32", 16), ("f32.f16.f16.f32", 8), ("f32.bf16.bf16.f32", 16), ("f32.bf16.bf16.f32", 8)),
        *(("f32.tf32.tf32.f32", 8), ("f32.tf32.tf32.f32", 4), ("s32.s8.s8.s32", 32), ("s32.s8.s8.s32", 16)),
        *(("f16.f16.f16.f16", 16), ("f16.f16.f16.f16", 8)),
    ],
)
def test_mma_on_small_integers(types: str, k: int) -> None:
    """Where every order gives the same sum all four models must give it."""
    kind = types.split(".")[1]
    each = {"f16": 2, "bf16": 2, "tf32": 1, "s8": 4}[kind]
    rng = np.random.default_rng(25)
    x, y, c = rng.integers(-5, 6, (16, k)), rng.integers(-5, 6, (k, 8)), rng.integers(-9, 10, (16, 8))
    bits = {
        "f16": lambda v: v.astype(np.float16).view(np.uint16), "bf16": lambda v: v.astype(np.float32).view(np.uint32) >> 16,
        "tf32": lambda v: v.astype(np.float32).view(np.uint32), "s8": lambda v: v.astype(np.int8).view(np.uint8),
    }[kind]  # fmt: skip
    a, b = fragments(bits(x), bits(y), each)
    want = scattered(x @ y + c)
    start = scattered(c)
    half = types.startswith("f16")
    if types.startswith("s32"):
        start, want = start.astype(np.int32).view(np.uint32), want.astype(np.int32).view(np.uint32)
    elif half:
        start, want = (np.ascontiguousarray(v.astype(np.float16)).view(np.uint32) for v in (start, want))
    else:
        start, want = (v.astype(np.float32).view(np.uint32) for v in (start, want))
    for model in range(4):
        got = mma(f"m16n8k{k}", types, (a.shape[1], b.shape[1], 2 if half else 4), a, b, np.ascontiguousarray(start), model)
        assert (got == want).all(), model


def test_the_four_models_differ_as_said() -> None:
    rng = np.random.default_rng(26)
    x, y, c = (
        rng.standard_normal((16, 16)).astype(np.float16),
        rng.standard_normal((16, 8)).astype(np.float16),
        rng.standard_normal((16, 8)).astype(np.float32),
    )
    x[0] = 0
    x[0, 0], x[0, 1], y[:, 0], c[0, 0] = 1, 1, 1, 2.0**30
    a, b = fragments(x.view(np.uint16), y.view(np.uint16), 2)
    got = [
        mma("m16n8k16", "f32.f16.f16.f32", (4, 2, 4), a, b, scattered(c).astype(np.float32).view(np.uint32), model)
        for model in range(4)
    ]

    def chain(order: np.ndarray) -> np.ndarray:
        return np.array([[_chain(c[i, j], x[i, order], y[order, j]) for j in range(8)] for i in range(16)], np.float32)

    def sum_of(i: int, j: int) -> Fraction:
        return sum(
            (Fraction(float(p)) * Fraction(float(q)) for p, q in zip(x[i], y[:, j], strict=True)), Fraction(float(c[i, j]))
        )

    exact = np.array([[rounded(sum_of(i, j), "rn") for j in range(8)] for i in range(16)], np.float32)
    assert (got[0] == scattered(chain(np.arange(16))).astype(np.float32).view(np.uint32)).all()
    assert (got[3] == scattered(chain(np.arange(15, -1, -1))).astype(np.float32).view(np.uint32)).all()
    assert (got[1] == scattered(exact).astype(np.float32).view(np.uint32)).all()
    error = np.abs(got[2].view(np.float32).astype(np.float64) - scattered(exact))
    assert (error <= 2.0**-20 * np.maximum(np.abs(scattered(exact)), 8)).all() and (got[2] != got[1]).any()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_the_third_model_aligns_and_cuts_off(kind: str) -> None:
    """Against fractions, with operands of any bits: every exponent, subnormal numbers, zeros, an infinity."""
    rng = np.random.default_rng(27)
    least, width, one = (-14, 10, 15 << 10) if kind == "f16" else (-126, 7, 127 << 7)

    def value(v: np.ndarray) -> np.ndarray:
        return v.view(np.float16).astype(np.float64) if kind == "f16" else (v.astype(np.uint32) << 16).view(np.float32) * 1.0

    def operand(*shape: int) -> np.ndarray:
        """Half of the exponents near one another, where what is cut off depends on each; a tenth zeros."""
        v = rng.integers(0, 1 << 16, shape).astype(np.uint16)
        near = v & (0x8000 | (1 << width) - 1) | one + (rng.integers(0, 4, shape) << width)
        v = np.where(rng.random(shape) < 0.5, v, near).astype(np.uint16)
        return np.where(np.isfinite(value(v)) & (rng.random(shape) < 0.9), v, 0).astype(np.uint16)

    x, y = operand(16, 16), operand(16, 8)
    x[3, 5] = 0x7C00 if kind == "f16" else 0x7F80
    c = (rng.standard_normal((16, 8)) * 2.0 ** rng.integers(-140, 30, (16, 8))).astype(np.float32)
    a, b = fragments(x, y, 2)
    got = mma("m16n8k16", f"f32.{kind}.{kind}.f32", (4, 2, 4), a, b, scattered(c).view(np.uint32), 2).view(np.float32)

    def exponent(v: float, least: int) -> int:
        return max(math.frexp(v)[1] - 1, least)

    def want(i: int, j: int, bits: int) -> float:
        terms = [(float(c[i, j]), exponent(float(c[i, j]), -126), Fraction(float(c[i, j])))] if c[i, j] else []
        for p, q in zip(value(x)[i].tolist(), value(y)[:, j].tolist(), strict=True):
            if not math.isfinite(p * q):
                return math.nan  # or an infinity: what an addition of doubles makes of it
            if p * q:
                terms.append((p * q, exponent(p, least) + exponent(q, least), Fraction(p) * Fraction(q)))
        unit = Fraction(2) ** (max((e for _, e, _ in terms), default=0) - bits)
        return rounded(sum(int(v / unit) for _, _, v in terms) * unit, "rz")

    for bits in (25, 24):
        wanted = scattered(np.array([[want(i, j, bits) for j in range(8)] for i in range(16)]))
        finite = np.isfinite(wanted)
        assert finite.sum() == 120 and not np.isfinite(got[~finite]).any()
        assert (got[finite] == wanted[finite]).all() == (bits == 25)


def _chain(s: np.float32, a: np.ndarray, b: np.ndarray) -> float:
    total = Fraction(float(s))
    for p, q in zip(a.tolist(), b.tolist(), strict=True):
        total = Fraction(rounded(total + Fraction(p) * Fraction(q), "rn"))
    return float(total)


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_and_stmatrix(trans: str) -> None:
    x = np.arange(32 * 8, dtype=np.uint16)
    out, back = np.zeros((32, 4), np.uint32), np.zeros(32 * 8, np.uint16)
    body = f"""
        .shared .align 16 .b8 tile[1024];
        shl.b32 %r1, %r0, 4; mov.u32 %r2, tile; add.u32 %r3, %r2, %r1; cvt.u64.u32 %d10, %r1; add.s64 %d11, %d1, %d10;
        add.s64 %d12, %d2, %d10; add.s64 %d13, %d3, %d10;
        ld.global.v4.u32 {{%r10, %r11, %r12, %r13}}, [%d11]; st.shared.v4.u32 [%r3], {{%r10, %r11, %r12, %r13}};
        bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r3];
        st.global.v4.u32 [%d12], {{%r20, %r21, %r22, %r23}};
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r3+512], {{%r20, %r21, %r22, %r23}}; bar.warp.sync -1;
        ld.shared.v4.u32 {{%r10, %r11, %r12, %r13}}, [%r3+512]; st.global.v4.u32 [%d13], {{%r10, %r11, %r12, %r13}};"""
    run(kernel(body, 3), "k", 1, 32, [x, out, back], race=True)
    m = x.reshape(4, 8, 8)
    m = m.transpose(0, 2, 1) if trans else m
    assert out.view(np.uint16).reshape(32, 4, 2).tolist() == [
        [m[k, lane // 4, lane % 4 * 2 :][:2].tolist() for k in range(4)] for lane in range(32)
    ]
    assert (back == x).all()


# ---- atomics


def test_atomics() -> None:
    out = np.zeros(8, np.uint32)
    out[2] = 1000
    body = """
        .shared .align 4 .b8 cell[4]; mov.u32 %r2, cell; setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.u32 [%r2], 0; bar.sync 0;
        atom.shared.add.u32 %r3, [%r2], 2; bar.sync 0; ld.shared.u32 %r4, [%r2]; @%p1 red.global.add.u32 [%d1], %r4;
        red.global.max.u32 [%d1+4], %r0; atom.global.min.u32 %r5, [%d1+8], %r0; red.global.add.f32 [%d1+12], 0f3F800000;
        atom.global.cas.b32 %r6, [%d1+16], 0, 77; atom.global.exch.b32 %r7, [%d1+20], 5; red.global.or.b32 [%d1+24], %r0;
        atom.global.inc.u32 %r8, [%d1+28], 9;"""
    run(kernel(body, 1), "k", 3, 64, [out], race=True, sched=2)
    assert out.tolist() == [3 * 128, 63, 0, 0x43400000, 77, 5, 63, 192 % 10]


# ---- what nvcc makes


SOURCE = """
extern "C" __global__ void sums(const float* x, float* y, int n) {
    __shared__ float part[8];
    float s = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) s = __fadd_rn(s, x[(size_t)blockIdx.x * n + i]);
    for (int half = 16; half > 0; half /= 2) s = __fadd_rn(s, __shfl_down_sync(0xffffffffu, s, half));
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = s;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < blockDim.x / 32; i++) s = __fadd_rn(s, part[i]);
        y[blockIdx.x] = s / sqrtf((float)n);
    }
}"""


def test_compiled_by_nvcc(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    (tmp_path / "sums.cu").write_text(SOURCE)
    subprocess.run([nvcc, "-ptx", "-O3", "--fmad=false", "-arch=sm_80", "sums.cu", "-o", "sums.ptx"], cwd=tmp_path, check=True)
    ptx = (tmp_path / "sums.ptx").read_text()
    assert open_bits(ptx, "sums") == {}
    n = 1000
    x = np.random.default_rng(27).standard_normal((3, n)).astype(np.float32)
    want = np.zeros(3, np.float32)
    for row in range(3):
        lanes = np.zeros(128, np.float32)
        for i in range(n):
            lanes[i % 128] += x[row, i]
        for half in (16, 8, 4, 2, 1):
            for w in range(0, 128, 32):
                for i in range(half):
                    lanes[w + i] += lanes[w + i + half]
        total = lanes[0]
        for w in (32, 64, 96):
            total += lanes[w]
        want[row] = total / np.sqrt(np.float32(n))
    for sched in (0, 1, 2):
        y = np.zeros(3, np.float32)
        run(ptx, "sums", 3, 128, [x, y, n], sched=sched, race=True)
        same(y, want)
    dropped = "\n".join("" if "bar.sync" in line else line for line in ptx.split("\n"))
    refused(
        dropped.replace("sums(", "k(").replace("sums_param", "k_param"),
        "race",
        grid=3,
        block=128,
        args=[x, np.zeros(3, np.float32), n],
        race=True,
    )
