"""Machine code as nvdisasm prints it: instructions, loops, what no kernel may hold."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

_MACHINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.L_\w+):")


@dataclass(frozen=True)
class Code:
    """A kernel's machine code."""

    ops: tuple[str, ...]
    operands: tuple[str, ...]
    loops: tuple[tuple[int, int], ...]  # first and last instruction

    def count(self, *roots: str) -> int:
        return sum(op.split(".")[0] in roots for op in self.ops)

    def from_nothing(self) -> int:
        """How many matrix instructions do not read the sum that they add to."""
        both = zip(self.ops, self.operands, strict=True)
        return sum(op.startswith("HGMMA") and "!UPT" in operands for op, operands in both)

    def undyed(self) -> Counter[str]:
        fma = (op for op in self.ops if op.split(".")[0] in ("FFMA", "FFMA2") and "RZ" not in op.split("."))
        return Counter(fma)

    def wide(self, *roots: str) -> int:
        return sum(op.split(".")[0] in roots and "128" in op.split(".") for op in self.ops)

    def forbidden(self, tensor: str | None = None) -> Counter[str]:
        """`tensor`: the matrix instruction that a kernel of mode tensor may have."""
        found: Counter[str] = Counter()
        for op, operands in zip(self.ops, self.operands, strict=True):
            root, parts = op.split(".")[0], op.split(".")
            local = root in ("LDL", "STL")
            atomic = root in ("ATOM", "ATOMG", "ATOMS", "RED", "REDG", "REDS")
            # HFMA2.MMA with zeros is ptxas' way to load a constant; it is no tensor core
            matrix = root.endswith("MMA") and root != "HFMA2" and root != tensor
            half = root in ("HFMA2", "HMUL2") and "RZ, RZ" not in operands
            half = half or (root == "HADD2" and "F32" not in parts)
            double = root in ("DADD", "DMUL", "DFMA")
            special = root == "MUFU" and parts[1] not in ("RCP", "RCP64H", "RSQ")  # these begin divisions and square roots
            if local or atomic or matrix or half or double or special:
                found[op] += 1
        return found

    def hot(self) -> tuple[int, int]:
        """Of the loop that is densest in FFMA, which is where a kernel that computes spends its time: these, and all its
        instructions, both without the loops inside it; (0, 0) without such a loop. One that divides is an epilogue's, if there
        is another. With tensor cores, of the loop with most HMMA or HGMMA: its instructions are also those for rows at odd
        addresses.
        """
        matrix = next((root for root in ("HGMMA", "HMMA") if self.count(root)), None)
        what, least = (matrix, 4) if matrix else ("FFMA", 8)
        found = []
        for a, b in self.loops:
            inside = {i for c, d in self.loops if (c, d) != (a, b) and a <= c and d <= b for i in range(c, d + 1)}
            own = [self.ops[i] for i in range(a, b + 1) if i not in inside]
            fma = sum(op.startswith(what) for op in own)
            if fma >= least:
                found.append((not any(op.startswith("MUFU") for op in own), fma if matrix else fma / len(own), fma, len(own)))
        return max(found, default=(False, 0.0, 0, 0))[2:]


def machine_kernels(text: str) -> dict[str, Code]:
    """From nvdisasm -c."""
    found = {}
    for section in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)[1:]:
        ops: list[str] = []
        operands: list[str] = []
        labels: dict[str, int] = {}
        jumps: list[tuple[str, int]] = []
        for line in section.splitlines():
            if label := _LABEL.match(line):
                labels[label[1]] = len(ops)
            elif instruction := _MACHINE.search(line):
                if instruction[1].split(".")[0] == "BRA" and (to := re.search(r"\.L_\w+", instruction[2])):
                    jumps.append((to[0], len(ops)))
                ops.append(instruction[1])
                operands.append(instruction[2])
        loops: dict[int, int] = {}  # from where to where; several jumps back to one place are one loop
        for to, at in jumps:
            if labels.get(to, at) < at:  # a jump to itself ends the code
                loops[labels[to]] = max(at, loops.get(labels[to], at))
        found[section.split(",")[0].strip()] = Code(tuple(ops), tuple(operands), tuple(sorted(loops.items())))
    return found
