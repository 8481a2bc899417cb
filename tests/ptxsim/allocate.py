"""Registers to cells. A warp's file should stay in the cache, and PTX has a new register for every value: so virtual registers
whose lives do not overlap share a cell.

A life is counted per thread, which is enough although a warp diverges: a lane only ever writes its own place in a cell.
"""

from __future__ import annotations

from dataclasses import dataclass, field

NONE = -1


@dataclass(slots=True)
class Record:
    """A decoded instruction; operands are numbers of virtual registers until `cells` has placed them."""

    op: int
    line: int
    x: list[int]
    writes: int = 0  # bit k: x[k] is written
    control: int = 0
    negate: bool = False
    mod: int = 0
    imm: int = 0
    guard: int = NONE
    target: int | str = 0
    more: list[int] = field(default_factory=list)  # further operands
    written: int = 0  # how many of them, the first ones, are written
    number: int = 0  # instead of `more`: a plain number
    labels: list[str] = field(default_factory=list)  # of a branch table
    opcode: str = ""

    def reads_and_writes(self) -> tuple[list[int], list[int]]:
        reads: list[int] = []
        writes: list[int] = []
        for k, v in enumerate(self.x):
            if v >= 0:
                (writes if self.writes >> k & 1 else reads).append(v)
        writes.extend(v for v in self.more[: self.written] if v >= 0)
        reads.extend(v for v in self.more[self.written :] if v >= 0)
        if self.guard >= 0:
            reads.append(self.guard)
        return reads, writes


BRANCH, EXIT, BRANCH_TABLE = 1, 2, 5


def _blocks(code: list[Record], labels: dict[str, int]) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """Basic blocks [begin, end) and their successors."""
    n = len(code)
    leaders = {0, *(i for i in labels.values() if i < n)}
    for i, r in enumerate(code):
        if r.control in (BRANCH, EXIT, BRANCH_TABLE) and i + 1 < n:
            leaders.add(i + 1)
    begins = sorted(leaders)
    spans = [(b, begins[k + 1] if k + 1 < len(begins) else n) for k, b in enumerate(begins)]
    at = {b: k for k, (b, _) in enumerate(spans)}
    following: list[list[int]] = []
    for k, (_, end) in enumerate(spans):
        last = code[end - 1]
        falls = last.control not in (BRANCH, EXIT, BRANCH_TABLE) or last.guard >= 0
        out = [k + 1] if falls and k + 1 < len(spans) else []
        if last.control == BRANCH:
            out.append(at[labels[str(last.target)]])
        elif last.control == BRANCH_TABLE:
            out.extend(at[labels[label]] for label in last.labels)
        following.append(out)
    return spans, following


def _bits(v: int) -> list[int]:
    out = []
    while v:
        low = v & -v
        out.append(low.bit_length() - 1)
        v ^= low
    return out


def lives(code: list[Record], labels: dict[str, int]) -> dict[int, tuple[int, int]]:
    """From where to where each virtual register must keep its value: 2i is the reading of instruction i, 2i + 1 its writing."""
    spans, following = _blocks(code, labels)
    operands = [r.reads_and_writes() for r in code]
    needs, kills = [], []
    for begin, end in spans:
        need = kill = 0
        for i in range(begin, end):
            reads, writes = operands[i]
            for v in reads:
                if not kill >> v & 1:
                    need |= 1 << v
            if code[i].guard < 0:
                for v in writes:
                    kill |= 1 << v
        needs.append(need)
        kills.append(kill)
    n = len(spans)
    live_in, live_out = list(needs), [0] * n
    preceding: list[list[int]] = [[] for _ in range(n)]
    for k, out in enumerate(following):
        for j in out:
            preceding[j].append(k)
    work, queued = list(range(n)), [True] * n
    while work:
        k = work.pop()
        queued[k] = False
        live_out[k] = 0
        for j in following[k]:
            live_out[k] |= live_in[j]
        into = needs[k] | (live_out[k] & ~kills[k])
        if into != live_in[k]:
            live_in[k] = into
            for j in preceding[k]:
                if not queued[j]:
                    queued[j] = True
                    work.append(j)
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    met = 0
    for k, (begin, end) in enumerate(spans):  # forwards: where each register is met first
        new = live_in[k] & ~met
        met |= new
        for v in _bits(new):
            first.setdefault(v, 2 * begin)
        for i in range(begin, end):
            reads, writes = operands[i]
            for v in reads:
                first.setdefault(v, 2 * i)
            for v in writes:
                first.setdefault(v, 2 * i + 1)
    met = 0
    for k, (begin, end) in reversed(list(enumerate(spans))):  # backwards: where last
        new = live_out[k] & ~met
        met |= new
        for v in _bits(new):
            last.setdefault(v, 2 * end - 1)
        for i in range(end - 1, begin - 1, -1):
            reads, writes = operands[i]
            for v in writes:
                last.setdefault(v, 2 * i + 1)
            for v in reads:
                last.setdefault(v, 2 * i)
    return {v: (begin, last[v]) for v, begin in first.items()}


def cells(spans: dict[int, tuple[int, int]], sizes: list[int], permanent: set[int]) -> tuple[list[int], int]:
    """Byte offset of every virtual register, and the size of a warp's file. Registers of one size share among themselves.

    A source that dies may be the destination's cell: every handler reads a lane's sources before it writes that lane.
    """
    slots: list[int] = [0] * len(sizes)
    count = {4: 0, 128: 0, 256: 0}
    free: dict[int, list[int]] = {4: [], 128: [], 256: []}
    ends: dict[int, list[int]] = {}
    for v, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        del begin
        if v not in permanent:
            ends.setdefault(end, []).append(v)
    starts = sorted((begin, v) for v, (begin, _) in spans.items() if v not in permanent)
    due = sorted(ends)
    at = 0
    for begin, v in starts:
        while at < len(due) and due[at] < begin:
            for dead in ends[due[at]]:
                free[sizes[dead]].append(slots[dead])
            at += 1
        size = sizes[v]
        if free[size]:
            slots[v] = free[size].pop()
        else:
            slots[v] = count[size]
            count[size] += 1
    for v in sorted(permanent):
        slots[v] = count[sizes[v]]
        count[sizes[v]] += 1
    base = {128: 0, 256: 128 * count[128], 4: 128 * count[128] + 256 * count[256]}
    offsets = [base[size] + size * slot for size, slot in zip(sizes, slots, strict=True)]
    return offsets, base[4] + 4 * count[4]
