"""Every instruction that is not regular (opcodes.py has those): from its modifiers and operands to a record."""

from __future__ import annotations

import re

from .allocate import NONE
from .opcodes import ABS, FTZ, RELU, RNA, SAT, cell, flags, plain
from .operands import ONES, Operands
from .parse import BITS, ParseError, integer, split_operands

PLAIN, BRANCH, EXIT, COLLECTIVE, BARRIER, BRANCH_TABLE, TRAP = range(7)
SIGNED, ADDRESS64, SHARED_ATOMIC, KEEP32 = 1, 2, 8, 256
SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW = 1 << 60, 2 << 60, 4 << 60


class Instructions(Operands):
    # ---- moves

    def op_mov(self, mods: list[str], o: list[str]) -> None:
        kind = cell(mods[-1])
        if o[0][0] == "{":
            parts = split_operands(o[0][1:-1])
            bits = BITS[mods[-1]]
            each = bits // len(parts)
            x = [NONE if part == "_" else self.destination(part, "D" if each == 64 else "W") for part in parts]
            x += [NONE] * (4 - len(x)) + [self.source(o[1], "d" if bits == 64 else "w")]
            self.emit(f"unpack.{len(parts)}x{each}", x, 15)
        elif o[1][0] == "{":
            parts = split_operands(o[1][1:-1])
            bits = BITS[mods[-1]]
            each = bits // len(parts)
            x = [self.destination(o[0], plain(mods[-1]))] + [self.source(part, "h" if each < 32 else "w") for part in parts]
            self.emit(f"pack.{len(parts)}x{each}", x, 1)
        elif kind == "p":
            number = integer(o[1])
            if number is not None:
                self.emit("mov.pred.imm", [self.destination(o[0], "P")], 1, imm=number)
            else:
                self.emit("mov.pred", [self.destination(o[0], "P"), self.source(o[1], "p")], 1)
        else:
            d = self.destination(o[0], plain(mods[-1]))
            self.emit({"h": "mov.16", "w": "mov.32", "f": "mov.32"}.get(kind, "mov.64"), [d, self.source(o[1], kind)], 1)

    def op_cvta(self, mods: list[str], o: list[str]) -> None:
        space = next(m.split("::")[0] for m in mods if m not in ("to", "u64", "u32"))
        window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}.get(space, 0)
        x = [self.destination(o[0], "D"), self.source(o[1], "d")]
        self.emit("mov.64" if not window else "from_generic" if "to" in mods else "to_generic", x, 1, imm=window)

    def op_isspacep(self, mods: list[str], o: list[str]) -> None:
        space = mods[0].split("::")[0]
        window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}.get(space, 0)
        self.emit("isspacep", [self.destination(o[0], "P"), self.source(o[1], "d")], 1, imm=window)

    def hint(self, mods: list[str], o: list[str]) -> None:
        self.emit("nothing", [], 0)

    op_membar = op_prefetch = op_prefetchu = op_discard = op_griddepcontrol = hint
    op_nanosleep = op_applypriority = op_pmevent = op_brkpt = hint

    def op_createpolicy(self, mods: list[str], o: list[str]) -> None:
        self.emit("mov.64", [self.destination(o[0], "D"), self.constant("d", 0)], 1)

    def op_activemask(self, mods: list[str], o: list[str]) -> None:
        self.emit("activemask", [self.destination(o[0], "W")], 1)

    # ---- loads and stores

    def space(self, mods: list[str], address: str) -> tuple[str, int, int, bool]:
        """State space as the machine names it, address register, offset, 64 bits wide."""
        named = next(
            (m.split("::")[0] for m in mods if m.split("::")[0] in ("global", "shared", "param", "local", "const")), "generic"
        )
        register, offset, wide, symbol = self.address(address)
        if named == "const":
            named = "global"
        if named == "param" and symbol and symbol not in self.params:
            named = "local"  # a parameter of a call
        return named, register, offset, wide

    def memory(self, mods: list[str], data: str, address: str, load: bool) -> None:
        dtype = mods[-1]
        bits = BITS[dtype]
        space, register, offset, wide = self.space(mods, address)
        parts = split_operands(data[1:-1]) if data[0] == "{" else [data]
        if bits == 128:
            raise ParseError("128-bit registers")
        d = []
        narrow = load and bits < 32
        after: list[tuple[str, int, int]] = []
        for part in parts:
            if load and part == "_":
                d.append(NONE)
                continue
            found = self.register(part)
            if load and found and bits < 64 and self.classes[found[1]] == "d":  # widened after the load
                narrow_register = self.new("w")
                after.append(("cvt.s64.s32" if dtype[0] == "s" else "cvt.u64.u32", found[1], narrow_register))
                d.append(narrow_register)
                continue
            d.append(self.destination(part, plain(dtype)) if load else self.low_part(part, cell(dtype)))
        mod = ADDRESS64 if wide else 0
        if narrow and dtype[0] == "s":
            mod |= SIGNED | (KEEP32 if all(v < 0 or self.bits[v] == 32 for v in d) else 0)
        x = [*(d + [NONE] * 4)[:4], register]
        name = f"{'ld' if load else 'st'}.{space}.{bits}x{len(parts)}"
        self.emit(name, x, 15 if load else 0, mod=mod, imm=offset, more=d[4:], written=len(d[4:]) if load else 0)
        for name, to, narrow_register in after:
            self.emit(name, [to, narrow_register], 1)
        if space in ("shared", "global", "generic"):
            self.granule(space, bits // 8)

    def granule(self, space: str, size: int) -> None:
        for s in ("shared", "global") if space == "generic" else (space,):
            self.granules[s] = min(self.granules[s], size)

    def op_ld(self, mods: list[str], o: list[str]) -> None:
        self.memory(mods, o[0], o[1], True)

    op_ldu = op_ld

    def op_st(self, mods: list[str], o: list[str]) -> None:
        self.memory(mods, o[1], o[0], False)

    def op_cp(self, mods: list[str], o: list[str]) -> None:
        if mods[0] != "async" or "mbarrier" in mods:
            raise ParseError("unknown instruction")
        if mods[1:] in (["commit_group"], ["wait_all"]):
            self.emit("cp.async." + mods[1], [], 0)
        elif mods[1:] == ["wait_group"]:
            self.emit("cp.async.wait_group", [], 0, imm=integer(o[0]))
        else:
            to, to_offset, wide, _ = self.address(o[0])
            source, source_offset, _, _ = self.address(o[1])
            size = integer(o[2])
            if size not in (4, 8, 16) or ("cg" in mods and size != 16):
                raise ParseError("size of the copy")
            valid, ignore = NONE, NONE
            for extra in o[3:]:
                found = self.register(extra)
                if found and self.classes[found[1]] == "p":
                    ignore = found[1]
                elif found is None or self.classes[found[1]] == "w":
                    valid = self.source(extra, "w")
            self.granule("shared", size)
            self.emit(
                "cp.async",
                [to, source, valid, ignore],
                0,
                mod=ADDRESS64 if wide else 0,
                imm=to_offset << 8 | size,
                target=source_offset,
            )

    def op_atom(self, mods: list[str], o: list[str]) -> None:
        dtype = mods[-1]
        operation = next((m for m in mods if m in ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")), "")
        if "noftz" in mods or dtype in ("f16", "bf16", "f16x2", "bf16x2"):
            dtype = next(m for m in mods if m in ("f16", "bf16", "f16x2", "bf16x2"))
        if operation in ("and", "or", "xor", "exch", "cas"):
            dtype = "b" + str(BITS[dtype])
        space, register, offset, wide = self.space(mods, o[1])
        data, old = [split_operands(t[1:-1]) if t[0] == "{" else [t] for t in (o[2], o[0])]
        size = BITS[dtype] // 8
        for k, part in enumerate(data):
            first = NONE if old == ["_"] else self.destination(old[k], plain(dtype))
            third = self.source(o[3], cell(dtype)) if operation == "cas" else NONE
            x = [first, self.source(part, cell(dtype)), third, NONE, register]
            mod = (ADDRESS64 if wide else 0) | (SHARED_ATOMIC if space == "shared" else 0)
            self.emit(f"atom.{operation}.{dtype}", x, 1, mod=mod, imm=offset + k * size)
        self.granule("generic" if space == "generic" else space, size)

    def op_red(self, mods: list[str], o: list[str]) -> None:
        self.op_atom(mods, ["_", *o])

    # ---- comparison and selection

    def compare(self, name: str, mods: list[str], first: list[int], writes: int, o: list[str], imm: int = 0) -> None:
        dtype = mods[-1]
        comparison = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(mods[0], mods[0])
        kind = {"b16": "u16", "b32": "u32", "b64": "u64"}.get(dtype, dtype)
        mod = FTZ if "ftz" in mods else 0
        x = [*first, self.source(o[0], cell(dtype)), self.source(o[1], cell(dtype))]
        join = next((m for m in mods[1:] if m in ("and", "or", "xor")), None)
        if join:
            mod |= {"and": 256, "or": 512, "xor": 768}[join] | (1024 if o[2][0] == "!" else 0)
            x.append(self.source(o[2].lstrip("! "), "p"))
        self.emit(f"{name}.{comparison}.{kind}", x, writes, mod=mod, imm=imm)

    def op_setp(self, mods: list[str], o: list[str]) -> None:
        p, _, q = (part.strip() for part in o[0].partition("|"))
        first = [self.destination(p, "P"), self.destination(q, "P") if q else NONE]
        self.compare("setp", mods, first, 3, o[1:])

    def op_set(self, mods: list[str], o: list[str]) -> None:
        to = mods[-2]
        yes = {
            "f32": 0x3F800000,
            "f16": 0x3C00,
            "bf16": 0x3F80,
            "f16x2": 0x3C00,
            "bf16x2": 0x3F80,
            "u16": 0xFFFF,
            "s16": 0xFFFF,
        }.get(to, ONES)
        if mods[-1].endswith("x2"):
            yes &= 0xFFFF
        self.compare("set", mods, [self.destination(o[0], "W"), NONE], 1, o[1:], yes)

    def op_selp(self, mods: list[str], o: list[str]) -> None:
        dtype = mods[-1]
        kind = cell(dtype)
        x = [self.destination(o[0], plain(dtype)), self.source(o[1], kind), self.source(o[2], kind), self.source(o[3], "p")]
        self.emit("selp.pred" if kind == "p" else "selp.64" if kind in "dg" else "selp.32", x, 1)

    # ---- conversion

    def op_cvt(self, mods: list[str], o: list[str]) -> None:
        types = [m for m in mods if m in BITS]
        if mods[0] == "pack" or len(types) != 2:
            raise ParseError("unknown instruction")
        to, source = types
        mod = flags(mods)
        rounding = next((m for m in mods if m in ("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi")), "")
        integral = int(rounding.endswith("i"))
        if to in ("f16x2", "bf16x2"):
            x = [self.destination(o[0], "W"), self.source(o[1], "f"), self.source(o[2], "f")]
            self.emit(f"cvt.{to}.f32", x, 1, mod=mod)
            return
        floating = ("f16", "bf16", "f32", "f64", "tf32")
        from_integer, to_integer = source not in floating, to not in floating
        name = f"cvt.{to}.{source}"
        s = self.low_part(o[1], cell(source))
        d = self.destination(o[0], plain(to)) if BITS[to] >= 32 or self.register(o[0]) is None else self.any_destination(o[0])
        if from_integer and to_integer:
            if "sat" in mods:
                name = f"cvt.sat.{to}.{source}"
            elif BITS[to] < 64:  # cut to `to`, then extended to the whole register
                if self.classes[s] == "d":
                    low = self.new("w")
                    self.emit("cvt.u32.u64", [low, s], 1)
                    s = low
                narrow = to if BITS[to] < BITS[source] else source
                name = f"cvt.{'u16' if self.bits[d] == 16 else 'u32' if self.bits[d] == 32 else 'u64'}.{narrow}"
        elif not from_integer and not to_integer:
            if (to, source) == ("f32", "f32"):
                name += ".mod" if mod or integral else ""
            elif source == "f32" and to in ("f16", "bf16"):
                name += ".mod" if mod & (RELU | SAT | FTZ | 12) else ""
            elif to == "tf32":
                name = "cvt.tf32.f32"
                mod = RNA if rounding == "rna" else 0
            if (to, source) in (("f16", "f64"), ("bf16", "f64")) and mod:
                raise ParseError("modifiers of a conversion from f64 to 16 bits")
            if (to == "f64" and source == "f32" and mod & SAT) or mod & ABS:
                raise ParseError("modifier")
            if to in ("f16", "bf16") and mod & 12 in (8, 12) and not integral:
                raise ParseError("rounding direction")
        self.emit(name, [d, s], 1, mod=mod, imm=integral)

    def any_destination(self, text: str) -> int:
        found = self.register(text)
        if not found or self.classes[found[1]] == "p":
            raise ParseError(f"destination {text}")
        return found[1]

    # ---- carry chains

    def carry(self, base: str, mods: list[str], o: list[str], carry_in: bool) -> None:
        dtype = mods[-1].replace("b", "u")
        flag = self.special_predicate("%carry")
        x = [self.destination(o[0], plain(dtype)), *(self.source(part, cell(dtype)) for part in o[1:])]
        x += [NONE] * (4 - len(x)) + [flag if "cc" in mods else NONE, flag if carry_in else NONE]
        hi = "hi" in mods
        mod = (1 if base == "sub" else 0) | (2 if hi else 0) | (4 if hi and dtype[0] == "s" else 0)
        self.emit(f"carry.{dtype}", x, 1 | 16, mod=mod)

    def special_predicate(self, name: str) -> int:
        if name not in self.scopes[0].registers:
            self.declare(self.scopes[0], name, "pred")
        return self.scopes[0].registers[name][1]

    def op_add(self, mods: list[str], o: list[str]) -> None:  # .cc: the others have a form
        self.carry("add", mods, o, False)

    def op_sub(self, mods: list[str], o: list[str]) -> None:
        self.carry("sub", mods, o, False)

    def op_mad(self, mods: list[str], o: list[str]) -> None:
        self.carry("mad", mods, o, False)

    def op_addc(self, mods: list[str], o: list[str]) -> None:
        self.carry("add", mods, o, True)

    def op_subc(self, mods: list[str], o: list[str]) -> None:
        self.carry("sub", mods, o, True)

    def op_madc(self, mods: list[str], o: list[str]) -> None:
        self.carry("mad", mods, o, True)

    # ---- bits

    def op_prmt(self, mods: list[str], o: list[str]) -> None:
        modes = ["f4e", "b4e", "rc8", "ecl", "ecr", "rc16"]
        mode = next((m for m in mods if m in modes), None)
        x = [self.destination(o[0], "W"), *(self.source(part, "w") for part in o[1:4])]
        self.emit("prmt.mode.b32" if mode else "prmt.b32", x, 1, imm=modes.index(mode) if mode else 0)

    def op_lop3(self, mods: list[str], o: list[str]) -> None:
        if mods != ["b32"]:
            raise ParseError("unknown instruction")
        x = [self.destination(o[0], "W"), *(self.source(part, "w") for part in o[1:4])]
        self.emit("lop3.b32", x, 1, imm=integer(o[4]))

    # ---- control

    def op_bra(self, mods: list[str], o: list[str]) -> None:
        self.emit("control", [], 0, control=BRANCH, target=o[0] + self.suffix)

    def op_brx(self, mods: list[str], o: list[str]) -> None:
        table = next((s.branch_tables[o[1]] for s in reversed(self.scopes) if o[1] in s.branch_tables), None)
        if table is None:
            raise ParseError(f"no .branchtargets {o[1]}")
        labels = [label + self.suffix for label in table]
        self.emit("control", [NONE, self.source(o[0], "w")], 0, control=BRANCH_TABLE, imm=len(labels), labels=labels)

    def op_ret(self, mods: list[str], o: list[str]) -> None:
        if self.inlined:
            self.emit("control", [], 0, control=BRANCH, target=self.end_label)
        else:
            self.op_exit(mods, o)

    def op_exit(self, mods: list[str], o: list[str]) -> None:
        self.emit("control", [], 0, control=EXIT)

    def op_trap(self, mods: list[str], o: list[str]) -> None:
        self.emit("control", [], 0, control=TRAP)

    # ---- barriers

    def op_bar(self, mods: list[str], o: list[str], aligned: bool = True) -> None:
        if "warp" in mods:
            self.collective("warp.sync", [], 0, o[0])
            return
        if "cluster" in mods or ("cta" not in mods and not any(m in ("sync", "arrive", "red") for m in mods)):
            raise ParseError("unknown instruction")
        aligned = aligned or "aligned" in mods
        mod, x = 1 if "arrive" in mods else 0, [NONE] * 4
        if "red" in mods:
            mod = {"popc": 2, "and": 4, "or": 6}[next(m for m in mods if m in ("popc", "and", "or"))]
            x[0] = self.destination(o[0], "W" if mod == 2 else "P")
            predicate = o[-1]
            mod |= 8 if predicate[0] == "!" else 0
            x[3] = self.source(predicate.lstrip("! "), "p")
            o = o[1:-1]
        number = integer(o[0]) if o else 0
        count = integer(o[1]) if len(o) > 1 else 0
        if number is None:
            x[1] = self.source(o[0], "w")
        if count is None:
            x[2] = self.source(o[1], "w")
        self.emit("control", x, 1, control=BARRIER, mod=mod, imm=int(aligned), target=number or 0, number=count or 0)

    def op_barrier(self, mods: list[str], o: list[str]) -> None:
        self.op_bar(mods, o, aligned=False)

    # ---- matrices

    def op_ldmatrix(self, mods: list[str], o: list[str], load: bool = True) -> None:
        if "m8n8" not in mods or mods[-1] != "b16":
            raise ParseError("shape")
        count = next(int(m[1:]) for m in mods if re.fullmatch(r"x[124]", m))
        data, address = (o[0], o[1]) if load else (o[1], o[0])
        register, offset, wide, _ = self.address(address)
        parts = split_operands(data[1:-1]) if data[0] == "{" else [data]
        x = [self.destination(p, "W") if load else self.source(p, "w") for p in parts]
        mod = (ADDRESS64 if wide else 0) | (8 if "trans" in mods else 0) | count << 4
        name = "ldmatrix" if load else "stmatrix"
        x = [*(x + [NONE] * 4)[:4], register]
        self.collective(name, x, 15 if load else 0, "-1", mod=mod, imm=offset)

    def op_stmatrix(self, mods: list[str], o: list[str]) -> None:
        self.op_ldmatrix(mods, o, False)

    def op_movmatrix(self, mods: list[str], o: list[str]) -> None:
        self.collective("movmatrix", [self.destination(o[0], "W"), self.source(o[1], "w")], 1, "-1")

    def op_mma(self, mods: list[str], o: list[str]) -> None:
        shape = next((re.fullmatch(r"m(\d+)n(\d+)k(\d+)", m) for m in mods if m[0] == "m" and "n" in m), None)
        types = [m for m in mods if m in BITS or m in ("e4m3", "e5m2", "s4", "u4", "b1")]
        kinds = {"f16": 0, "bf16": 1, "tf32": 2, "s8": 3, "u8": 4, "e4m3": 5, "e5m2": 6}
        if shape is None or len(types) != 4 or "sp" in mods or "sync" not in mods or "block_scale" in mods:
            raise ParseError("unknown instruction")
        m, n, k = (int(g) for g in shape.groups())
        registers = [split_operands(part[1:-1]) if part[0] == "{" else [part] for part in o[:4]]
        if types[0] == "f64":
            if (m, n, k) != (8, 8, 4):
                raise ParseError("shape")
            more = [self.source(r, "g") for part in registers for r in part]
            self.collective("mma.f64", [], 0, "-1", more=more, written=2)
            return
        if (
            n != 8
            or m not in (8, 16)
            or types[1] not in kinds
            or types[2] not in kinds
            or "row" not in mods
            or mods.index("col") < mods.index("row")
        ):
            raise ParseError("shape or types")
        each = {0: 2, 1: 2, 2: 1}.get(kinds[types[1]], 4)
        half = types[0] == "f16"
        counts = [(m // 8) * (1 if half else 2), k // (4 * each) * (m // 8), k // (4 * each), (m // 8) * (1 if half else 2)]
        if [len(part) for part in registers] != counts or (m == 8 and types[1] in ("f16", "bf16")):
            raise ParseError("shape or types")
        more = [self.source(r, "w") for part in registers for r in part]
        imm = (
            m
            | n << 8
            | k << 16
            | kinds[types[1]] << 24
            | kinds[types[2]] << 28
            | int(half) << 32
            | int("satfinite" in mods) << 33
        )
        self.collective("mma", [], 0, "-1", more=more, imm=imm, written=counts[0])

    # ---- collectives

    def collective(self, name: str, x: list[int], writes: int, members: str, **more: object) -> None:
        number = integer(members)
        x = x + [NONE] * (5 - len(x)) + [NONE if number is not None else self.source(members, "w")]
        self.emit(name, x, writes, control=COLLECTIVE, target=(number or 0) & ONES, **more)

    def pair(self, text: str) -> list[int]:
        d, _, p = (part.strip() for part in text.partition("|"))
        return [self.destination(d, "W") if d != "_" else NONE, self.destination(p, "P") if p else NONE]

    def op_shfl(self, mods: list[str], o: list[str]) -> None:
        if mods[0] != "sync":
            raise ParseError("without .sync")
        self.collective("shfl." + mods[1], [*self.pair(o[0]), *(self.source(part, "w") for part in o[1:4])], 3, o[4])

    def op_vote(self, mods: list[str], o: list[str]) -> None:
        if mods[0] != "sync":
            raise ParseError("without .sync")
        d = self.destination(o[0], "W" if mods[1] == "ballot" else "P")
        negated = o[1][0] == "!"
        number = integer(o[1])
        if number is not None:
            p = self.new("p")
            self.emit("mov.pred.imm", [p], 1, imm=number)
        else:
            p = self.source(o[1].lstrip("! "), "p")
        self.collective("vote." + mods[1], [d, p], 1, o[2], mod=int(negated))

    def op_match(self, mods: list[str], o: list[str]) -> None:
        x = [*self.pair(o[0]), self.source(o[1], cell(mods[-1]))]
        self.collective(f"match.{mods[0]}.{mods[-1]}", x, 3, o[2])

    def op_redux(self, mods: list[str], o: list[str]) -> None:
        dtype = mods[-1].replace("b32", "u32") if mods[1] in ("add", "min", "max") else "b32"
        self.collective(f"redux.{mods[1]}.{dtype}", [self.destination(o[0], "W"), self.source(o[1], "w")], 1, o[2])

    def op_elect(self, mods: list[str], o: list[str]) -> None:
        self.collective("elect", self.pair(o[0]), 3, o[1])
