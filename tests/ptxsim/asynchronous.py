"""mbarriers, bulk copies (TMA), wgmma and what belongs to them: from modifiers and operands to a record."""

from __future__ import annotations

import re

from .allocate import NONE, Record
from .instructions import ADDRESS64, COLLECTIVE, PLAIN, Instructions
from .parse import ParseError, integer, split_operands

WATCHED, MBARRIER_WAIT, WGMMA_WAIT = 7, 8, 9
PARITY, TRY, ANNOUNCES, NO_ARRIVAL, OWN_RULES = 4, 8, 16, 32, 0xFFFF
TRANSPOSED_A, TRANSPOSED_B, BF16, NEGATED_A, NEGATED_B, A_IN_REGISTERS, ADD = 1, 2, 4, 8, 16, 32, 64


class Asynchronous(Instructions):
    # ---- mbarriers

    def op_mbarrier(self, mods: list[str], o: list[str]) -> None:
        what = mods[0]
        if mods[-1] != "b64" or "shared::cluster" in mods or "noComplete" in mods:
            raise ParseError("unknown instruction")
        takes_result = what in ("arrive", "test_wait", "try_wait")
        result = o.pop(0) if takes_result else "_"
        register, offset, wide, _ = self.address(o[0])
        mod = ADDRESS64 if wide else 0
        self.granule("shared", 8)
        if what in ("init", "inval"):
            count = self.source(o[1], "w") if what == "init" else NONE
            self.emit("mbarrier." + what, [NONE, register, count], 0, mod=mod, imm=offset)
        elif what in ("expect_tx", "complete_tx"):
            x = [NONE, register, NONE, self.source(o[1], "w")]
            name = "mbarrier.arrive" if what == "expect_tx" else "mbarrier.complete_tx"
            self.emit(name, x, 0, mod=mod | ANNOUNCES | NO_ARRIVAL, imm=offset)
        elif what == "arrive":
            state = NONE if result == "_" else self.destination(result, "D")
            announces = "expect_tx" in mods
            given = self.source(o[1], "w") if len(o) > 1 else NONE
            x = [state, register, NONE if announces else given, given if announces else NONE]
            self.emit("mbarrier.arrive", x, 1, mod=mod | (ANNOUNCES if announces else 0), imm=offset)
        elif what in ("test_wait", "try_wait"):
            parity = "parity" in mods
            x = [self.destination(result, "P"), register, self.source(o[1], "w" if parity else "d")]
            mod |= (PARITY if parity else 0) | (TRY if what == "try_wait" else 0)
            self.emit("control", x, 1, control=MBARRIER_WAIT, mod=mod, imm=offset)
        else:
            raise ParseError("unknown instruction")

    def op_fence(self, mods: list[str], o: list[str]) -> None:
        if mods[:2] == ["proxy", "async"] or (mods[0] == "proxy" and mods[1].startswith("async::")):
            if any("global" in m for m in mods):
                self.hint(mods, o)
            else:
                self.emit("fence.async", [], 0)
        elif mods[0] == "mbarrier_init":
            self.emit("fence.async", [], 0, imm=1)
        else:
            self.hint(mods, o)

    # ---- bulk copies

    def op_cp(self, mods: list[str], o: list[str]) -> None:
        if mods[:2] != ["async", "bulk"]:
            super().op_cp(mods, o)
            return
        if "prefetch" in mods:
            self.hint(mods, o)
            return
        rank = next((int(m[0]) for m in mods if re.fullmatch(r"[1-5]d", m)), 0)
        to_shared = mods[4:5] in (["shared::cluster"], ["shared::cta"]) and mods[5:6] == ["global"]
        tile = not any(m.startswith(("im2col", "tile::", "multicast")) for m in mods)
        if not rank or mods[2] != "tensor" or not to_shared or not tile or "mbarrier::complete_tx::bytes" not in mods:
            raise ParseError("unknown instruction")
        to, to_offset, to_wide, _ = self.address(o[0])
        name, coordinates = split_operands(o[1][1:-1])
        tensor_map = self.source(name, "d")
        at = [self.source(part, "w") for part in split_operands(coordinates[1:-1])]
        if len(at) != rank:
            raise ParseError("coordinates")
        mbar, mbar_offset, mbar_wide, _ = self.address(o[2])
        mod = (ADDRESS64 if to_wide else 0) | (4 if mbar_wide else 0) | rank << 4
        x = [to, tensor_map, mbar, *(at + [NONE] * 3)[:3]]
        self.emit("bulk.tensor", x, 0, mod=mod, imm=to_offset, target=mbar_offset, more=at[3:])

    # ---- wgmma

    def op_wgmma(self, mods: list[str], o: list[str]) -> None:
        if mods[:1] == ["mma_async"]:
            self.product(mods, o)
        elif mods == ["fence", "sync", "aligned"] or mods == ["commit_group", "sync", "aligned"]:
            self.collective("wgmma." + mods[0], [], 0, "-1")
        elif mods == ["wait_group", "sync", "aligned"]:
            self.collective("wgmma.gather", [], 0, "-1")  # all lanes of the warp first
            self.emit("control", [], 0, control=WGMMA_WAIT, imm=integer(o[0]))
        else:
            raise ParseError("unknown instruction")

    def product(self, mods: list[str], o: list[str]) -> None:
        shape = re.fullmatch(r"m64n(\d+)k16", mods[3])
        types = mods[4:]
        if not shape or types not in (["f32", "f16", "f16"], ["f32", "bf16", "bf16"]):
            raise ParseError("shape or types")
        n = int(shape[1])
        sums = [self.source(r, "w") for r in split_operands(o[0][1:-1])]
        if n % 8 or not 8 <= n <= 256 or len(sums) != n // 2:
            raise ParseError("shape or types")
        from_registers = o[1][0] == "{"
        a = [self.source(r, "w") for r in split_operands(o[1][1:-1])] if from_registers else []
        what = (A_IN_REGISTERS if from_registers else 0) | (BF16 if types[1] == "bf16" else 0)
        if from_registers and len(a) != 4:
            raise ParseError("shape or types")
        add = integer(o[3])
        what |= ADD if add else 0
        numbers = [integer(part) for part in o[4:]]
        if numbers[:2] not in ([1, 1], [1, -1], [-1, 1], [-1, -1]) or len(numbers) != (3 if from_registers else 4):
            raise ParseError("immediates")
        what |= (NEGATED_A if numbers[0] == -1 else 0) | (NEGATED_B if numbers[1] == -1 else 0)
        what |= TRANSPOSED_B if numbers[-1] else 0
        what |= TRANSPOSED_A if not from_registers and numbers[2] else 0
        predicate = NONE if add is not None else self.source(o[3], "p")
        x = [NONE if from_registers else self.source(o[1], "d"), self.source(o[2], "d"), predicate]
        self.granule("shared", 16)
        self.collective("wgmma", x, 0, "-1", mod=OWN_RULES, imm=n | what << 16, more=sums + a, written=len(sums))

    def op_setmaxnreg(self, mods: list[str], o: list[str]) -> None:
        count = integer(o[0]) or 0
        if mods[1:] != ["sync", "aligned", "u32"] or mods[0] not in ("inc", "dec"):
            raise ParseError("unknown instruction")
        if not 24 <= count <= 256 or count % 8:
            raise ParseError("registers of setmaxnreg: a multiple of 8 from 24 to 256")
        self.collective("setmaxnreg", [], 0, "-1", imm=count, mod=int(mods[0] == "inc"))


def watch(code: list[Record]) -> tuple[dict[int, int], list[list[int]]]:
    """The registers that wgmmas use, numbered; and of each instruction those that it touches, as 2 * number + written."""
    numbers: dict[int, int] = {}
    for r in code:
        if r.mod == OWN_RULES:
            for v in r.more:
                numbers.setdefault(v, len(numbers))
    touches: list[list[int]] = []
    for r in code if numbers else []:
        if r.mod == OWN_RULES:
            touches.append([2 * numbers[v] for v in r.more])
            continue
        reads, writes = r.reads_and_writes()
        touches.append([2 * numbers[v] for v in reads if v in numbers] + [2 * numbers[v] + 1 for v in writes if v in numbers])
        if touches[-1] and r.control == PLAIN:
            r.control = WATCHED
        elif touches[-1] and r.control != COLLECTIVE:
            raise ParseError(f"PTX line {r.line}: a register of a wgmma in an instruction that may not have one")
    return numbers, touches
