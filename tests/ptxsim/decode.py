"""A kernel's statements to the records that the machine runs.

Device functions are inlined where they are called; call parameters live in the thread's local memory.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from . import allocate
from .allocate import NONE, Record
from .opcodes import ABS, FTZ, RELU, RNA, SAT, Plan, cell, flags, plain, plan
from .parse import BITS, Function, ModuleText, ParseError, Variable, align, float_bits, integer, parameters, split_operands
from .parse import statements, variables

PLAIN, BRANCH, EXIT, COLLECTIVE, BARRIER, BRANCH_TABLE, TRAP = range(7)
SIGNED, ADDRESS64, ATOMIC, KEEP32 = 1, 2, 4, 256
SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW = 1 << 60, 2 << 60, 4 << 60
SIZE = {"p": 4, "w": 128, "d": 256}
ONES = 0xFFFFFFFF


@dataclass
class Program:
    """What the machine needs to run a kernel."""

    code: list[Record]
    labels: dict[str, int]
    offsets: list[int]
    file_bytes: int
    constants: list[tuple[int, bool, int]]  # virtual register, 64 bits wide, value
    specials: list[tuple[int, int]]  # virtual register, which
    static_shared: int
    local_bytes: int
    shared_granule: int
    global_granule: int


@dataclass
class Scope:
    """Names of a { } block."""

    registers: dict[str, tuple[str, int]] = field(default_factory=dict)  # name -> type, virtual register
    patterns: dict[str, tuple[str, int]] = field(default_factory=dict)  # %r<100>: prefix -> type, count
    branch_tables: dict[str, list[str]] = field(default_factory=dict)


_OPERATION = re.compile(r"(?:@(!?)\s*([\w$%]+)\s+)?([\w.:]+)\s*(.*)\Z", re.S)
_ADDRESS = re.compile(r"\[\s*([\w$%.]+)\s*(?:([+-])\s*(-?\w+))?\s*\]\Z")
_NUMBERED = re.compile(r"(.*?[A-Za-z_$%])(\d+)\Z")


class Decoder:
    def __init__(self, module: ModuleText, names: dict[str, int], specials: dict[str, int], address_of: Callable[[str], int]):
        self.module, self.names, self.special_numbers, self.address_of = module, names, specials, address_of
        self.code: list[Record] = []
        self.labels: dict[str, int] = {}
        self.classes: list[str] = []  # of every virtual register: p w d
        self.bits: list[int] = []
        self.constants: dict[tuple[str, int], int] = {}
        self.specials: dict[str, int] = {}
        self.scopes: list[Scope] = []
        self.lookup_cache: dict[str, tuple[str, int]] = {}
        self.shared: dict[str, int] = {}
        self.local: dict[str, int] = {}  # also call parameters
        self.local_bytes = 0
        self.params: dict[str, Variable] = {}
        self.line = 0
        self.guard, self.negate = NONE, False
        self.opcode = ""
        self.inlined: list[str] = []
        self.instances = 0
        self.suffix = ""
        self.end_label = ""
        self.granules = {"shared": 16, "global": 16}

    # ---- virtual registers

    def new(self, kind: str, bits: int = 0) -> int:
        self.classes.append(kind)
        self.bits.append(bits or {"p": 1, "w": 32, "d": 64}[kind])
        return len(self.classes) - 1

    def register(self, name: str) -> tuple[str, int] | None:
        found = self.lookup_cache.get(name)
        if found:
            return found
        for scope in reversed(self.scopes):
            found = scope.registers.get(name)
            if not found:
                m = _NUMBERED.match(name)
                pattern = scope.patterns.get(m[1]) if m else None
                if not m or not pattern or int(m[2]) >= pattern[1]:
                    continue
                found = self.declare(scope, name, pattern[0])
            self.lookup_cache[name] = found
            return found
        return None

    def declare(self, scope: Scope, name: str, type: str) -> tuple[str, int]:
        bits = BITS[type]
        if bits == 128:
            raise ParseError("128-bit registers")
        scope.registers[name] = (type, self.new("p" if bits == 1 else "d" if bits == 64 else "w", bits))
        return scope.registers[name]

    def constant(self, kind: str, value: int) -> int:
        value &= (1 << 64) - 1 if kind == "d" else ONES
        key = (kind, value)
        if key not in self.constants:
            self.constants[key] = self.new(kind)
        return self.constants[key]

    def special(self, name: str, kind: str) -> int:
        if name in ("%clock", "%clock64", "%clock_hi", "%globaltimer", "%globaltimer_lo", "%globaltimer_hi", "%smid", "%gridid",
                    "%cluster_ctarank", "%current_graph_exec", "%cluster_ctaid.x", "%cluster_ctaid.y", "%cluster_ctaid.z"):  # fmt: skip
            return self.constant(kind, 0)
        if name in ("%nsmid", "%cluster_nctarank", "%cluster_nctaid.x", "%cluster_nctaid.y", "%cluster_nctaid.z", "WARP_SZ"):
            return self.constant(kind, 32 if name == "WARP_SZ" else 1)
        if name not in self.special_numbers:
            raise ParseError(f"special register {name}")
        if name not in self.specials:
            self.specials[name] = self.new("w")
        v = self.specials[name]
        if kind == "d":  # widened where it is used
            wide = self.new("d")
            self.emit_plain("cvt.u64.u32", [wide, v], 1)
            return wide
        return v

    def symbol(self, name: str) -> int | None:
        """The address of a variable in its own state space."""
        for table in (self.local, self.shared):
            if name in table:
                return table[name]
        if name in self.params:
            return self.params[name].offset
        if name in self.module.variables["global"] or name in self.module.variables["const"]:
            return self.address_of(name)
        return None

    # ---- operands

    def source(self, text: str, letter: str) -> int:
        """The virtual register of an operand, a constant's where it is an immediate."""
        found = self.register(text)
        kind = {"f": "w", "h": "w", "g": "d"}.get(letter, letter)
        if found:
            v = found[1]
            have = self.classes[v]
            if have != kind:
                raise ParseError(f"operand {text} is .{found[0]}")
            return v
        number = integer(text)
        if number is not None:
            if letter == "f":
                number = struct.unpack("<I", struct.pack("<f", float(number)))[0]
            elif letter == "g":
                number = struct.unpack("<Q", struct.pack("<d", float(number)))[0]
            elif letter == "h":
                number &= 0xFFFF
            return self.constant(kind, number)
        literal = float_bits(text, "f64" if letter == "g" else "f32")
        if literal is not None:
            return self.constant(kind, literal)
        if text[0] == "%" or text == "WARP_SZ":
            return self.special(text, kind)
        m = re.fullmatch(r"([\w$%]+)\s*(?:([+-])\s*(\w+))?", text)
        if m:
            address = self.symbol(m[1])
            offset = (integer(m[3]) or 0) * (-1 if m[2] == "-" else 1) if m[3] else 0
            if address is not None:
                return self.constant(kind, address + offset)
        raise ParseError(f"operand {text}")

    def low_part(self, text: str, letter: str) -> int:
        """A source that may be wider than the instruction's type (ld, st and cvt allow it): its low bits count."""
        found = self.register(text)
        if found and letter in "wfh" and self.classes[found[1]] == "d":
            low = self.new("w")
            self.emit_plain("cvt.u32.u64", [low, found[1]], 1)
            return low
        return self.source(text, letter)

    def destination(self, text: str, letter: str) -> int:
        if text == "_":
            return self.new(letter.lower()) if letter != "P" else NONE
        found = self.register(text)
        if not found or self.classes[found[1]] != letter.lower():
            raise ParseError(f"destination {text}" + (f" is .{found[0]}" if found else ""))
        return found[1]

    def address(self, text: str) -> tuple[int, int, bool, str]:
        """[register or symbol, + offset] -> register or NONE, offset, whether the register has 64 bits, the symbol's name."""
        m = _ADDRESS.match(text)
        if not m:
            raise ParseError(f"address {text}")
        offset = 0
        if m[3]:
            number = integer(m[3])
            if number is None:
                raise ParseError(f"address {text}")
            offset = -number if m[2] == "-" else number
        found = self.register(m[1])
        if found:
            return found[1], offset, self.classes[found[1]] == "d", ""
        number = integer(m[1])
        if number is not None:
            return NONE, number + offset, True, ""
        address = self.symbol(m[1])
        if address is None:
            raise ParseError(f"address {text}")
        return NONE, address + offset, True, m[1]

    # ---- records

    def emit(self, name: str, x: list[int], writes: int, **more: object) -> Record:
        number = self.names.get(name)
        if number is None:
            raise ParseError(f"not known ({name})")
        record = Record(number, self.line, x, writes, guard=self.guard, negate=self.negate, opcode=self.opcode)
        for key, value in more.items():
            setattr(record, key, value)
        self.code.append(record)
        return record

    def emit_plain(self, name: str, x: list[int], writes: int) -> None:
        """Without the statement's guard."""
        guard, self.guard = self.guard, NONE
        self.emit(name, x, writes)
        self.guard = guard

    def run_plan(self, p: Plan, operands: list[str]) -> None:
        if len(operands) != len(p.kinds):
            raise ParseError(f"{len(p.kinds)} operands wanted")
        x = [self.destination(operands[0], p.kinds[0])]
        for text, letter in zip(operands[1:], p.kinds[1:], strict=True):
            x.append(self.source(text, letter))
        self.emit(p.name, x, 1, mod=p.mod, imm=p.imm)

    # ---- statements

    def body(self, function: Function) -> None:
        depth = len(self.scopes)
        self.scopes.append(Scope())
        for s in statements(function):
            self.line = s.line
            try:
                if s.kind == "instruction":
                    self.instruction(s.text)
                elif s.kind == "{":
                    self.scopes.append(Scope())
                elif s.kind == "}":
                    self.forget(self.scopes.pop())
                elif s.kind == "label":
                    self.pending_label = s.text
                    self.labels[s.text + self.suffix] = len(self.code)
                else:
                    self.directive(s.text)
            except (ParseError, KeyError, IndexError, ValueError, struct.error) as e:
                if isinstance(e, ParseError) and e.args[0].startswith("PTX line"):
                    raise
                why = str(e) if isinstance(e, ParseError) else f"not understood ({type(e).__name__}: {e})"
                raise ParseError(f"PTX line {s.line}: {s.text[:160]}: {why}") from e
        while len(self.scopes) > depth:
            self.forget(self.scopes.pop())

    def forget(self, scope: Scope) -> None:
        if scope.registers:
            self.lookup_cache.clear()

    def directive(self, text: str) -> None:
        if text.startswith(".reg"):
            m = re.match(r"\.reg\s+(?:\.v[24]\s+)?\.(\w+)\s+(.*)\Z", text)
            if not m:
                raise ParseError("declaration not understood")
            scope = self.scopes[-1]
            for name in split_operands(m[2]):
                many = re.fullmatch(r"([\w$%]+)<(\d+)>", name)
                if many:
                    scope.patterns[many[1]] = (m[1], int(many[2]))
                else:
                    self.declare(scope, name, m[1])
            self.lookup_cache.clear()
            return
        if re.match(r"\.(local|param)\b", text):
            for v in (variables(text)[1] if text.startswith(".local") else parameters(text)):
                self.local_bytes = align(self.local_bytes, v.align)
                self.local[v.name] = self.local_bytes
                self.local_bytes += v.size
            return
        if text.startswith(".branchtargets"):
            self.scopes[-1].branch_tables[self.pending_label] = split_operands(text[len(".branchtargets") :].strip())
            return
        if re.match(r"\.(shared|pragma|callprototype|noreturn|maxn|minn|req|section|alias)", text):
            return  # shared variables have been laid out before
        raise ParseError("unknown directive")

    def instruction(self, text: str) -> None:
        m = _OPERATION.match(text)
        if not m:
            raise ParseError("not understood")
        self.guard, self.negate = NONE, False
        if m[2]:
            self.guard, self.negate = self.source(m[2], "p"), m[1] == "!"
        opcode = m[3]
        self.opcode = opcode
        operands = split_operands(m[4])
        p = plan(opcode, len(operands))
        if p:
            self.run_plan(p, operands)
            return
        parts = opcode.split(".")
        method = getattr(self, "op_" + parts[0], None)
        if method is None:
            raise ParseError("unknown instruction")
        method(parts[1:], operands)

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

    op_membar = op_fence = op_prefetch = op_prefetchu = op_discard = op_griddepcontrol = hint
    op_nanosleep = op_setmaxnreg = op_applypriority = op_pmevent = op_brkpt = hint

    def op_createpolicy(self, mods: list[str], o: list[str]) -> None:
        self.emit("mov.64", [self.destination(o[0], "D"), self.constant("d", 0)], 1)

    def op_activemask(self, mods: list[str], o: list[str]) -> None:
        self.emit("activemask", [self.destination(o[0], "W")], 1)

    # ---- loads and stores

    def space(self, mods: list[str], address: str) -> tuple[str, int, int, bool]:
        """State space as the machine names it, address register, offset, 64 bits wide."""
        named = next((m.split("::")[0] for m in mods if m.split("::")[0] in ("global", "shared", "param", "local", "const")), "generic")
        register, offset, wide, symbol = self.address(address)
        if named == "const":
            named = "global"
        if named == "param" and symbol and symbol not in self.params:
            named = "local"  # a parameter of a call
        return named, register, offset, wide

    def memory(self, mods: list[str], data: str, address: str, load: bool) -> None:
        type = mods[-1]
        bits = BITS[type]
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
                after.append(("cvt.s64.s32" if type[0] == "s" else "cvt.u64.u32", found[1], narrow_register))
                d.append(narrow_register)
                continue
            d.append(self.destination(part, plain(type)) if load else self.low_part(part, cell(type)))
        mod = ADDRESS64 if wide else 0
        if narrow and type[0] == "s":
            mod |= SIGNED | (KEEP32 if all(v < 0 or self.bits[v] == 32 for v in d) else 0)
        x = (d + [NONE] * 4)[:4] + [register]
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
        if mods[0] != "async" or "bulk" in mods or "mbarrier" in mods:
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
            self.emit("cp.async", [to, source, valid, ignore], 0, mod=ADDRESS64 if wide else 0, imm=to_offset << 8 | size, target=source_offset)

    def op_atom(self, mods: list[str], o: list[str]) -> None:
        type = mods[-1]
        operation = next((m for m in mods if m in ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")), "")
        if "noftz" in mods or type in ("f16", "bf16", "f16x2", "bf16x2"):
            type = next(m for m in mods if m in ("f16", "bf16", "f16x2", "bf16x2"))
        if operation in ("and", "or", "xor", "exch", "cas"):
            type = "b" + str(BITS[type])
        space, register, offset, wide = self.space(mods, o[1])
        data, old = ([split_operands(t[1:-1]) if t[0] == "{" else [t] for t in (o[2], o[0])])
        size = BITS[type] // 8
        for k, part in enumerate(data):
            first = NONE if old == ["_"] else self.destination(old[k], plain(type))
            third = self.source(o[3], cell(type)) if operation == "cas" else NONE
            x = [first, self.source(part, cell(type)), third, NONE, register]
            mod = (ADDRESS64 if wide else 0) | (8 if space == "shared" else 0)
            self.emit(f"atom.{operation}.{type}", x, 1, mod=mod, imm=offset + k * size)
        self.granule("generic" if space == "generic" else space, size)

    def op_red(self, mods: list[str], o: list[str]) -> None:
        self.op_atom(mods, ["_", *o])

    # ---- comparison and selection

    def compare(self, name: str, mods: list[str], first: list[int], writes: int, o: list[str], imm: int = 0) -> None:
        type = mods[-1]
        comparison = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(mods[0], mods[0])
        kind = {"b16": "u16", "b32": "u32", "b64": "u64"}.get(type, type)
        mod = FTZ if "ftz" in mods else 0
        x = [*first, self.source(o[0], cell(type)), self.source(o[1], cell(type))]
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
        yes = {"f32": 0x3F800000, "f16": 0x3C00, "bf16": 0x3F80, "f16x2": 0x3C00, "bf16x2": 0x3F80, "u16": 0xFFFF, "s16": 0xFFFF}.get(to, ONES)
        if mods[-1].endswith("x2"):
            yes &= 0xFFFF
        self.compare("set", mods, [self.destination(o[0], "W"), NONE], 1, o[1:], yes)

    def op_selp(self, mods: list[str], o: list[str]) -> None:
        type = mods[-1]
        kind = cell(type)
        x = [self.destination(o[0], plain(type)), self.source(o[1], kind), self.source(o[2], kind), self.source(o[3], "p")]
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
            if to == "f64" and source == "f32" and mod & SAT or mod & ABS:
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
        type = mods[-1].replace("b", "u")
        flag = self.special_predicate("%carry")
        x = [self.destination(o[0], plain(type)), *(self.source(part, cell(type)) for part in o[1:])]
        x += [NONE] * (4 - len(x)) + [flag if "cc" in mods else NONE, flag if carry_in else NONE]
        hi = "hi" in mods
        mod = (1 if base == "sub" else 0) | (2 if hi else 0) | (4 if hi and type[0] == "s" else 0)
        self.emit(f"carry.{type}", x, 1 | 16, mod=mod)

    def special_predicate(self, name: str) -> int:
        if name not in self.scopes[0].registers:
            self.declare(self.scopes[0], name, "pred")
        return self.scopes[0].registers[name][1]

    def op_add(self, mods: list[str], o: list[str]) -> None:  # .cc: the others have a plan
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

    def op_call(self, mods: list[str], o: list[str]) -> None:
        results = [] if o[0][0] != "(" else [r.strip() for r in o[0][1:-1].split(",") if r.strip()]
        name, arguments = (o[1], o[2:]) if o[0][0] == "(" else (o[0], o[1:])
        given = [a.strip() for a in arguments[0][1:-1].split(",") if a.strip()] if arguments else []
        if name == "vprintf":
            self.emit("st.local.32x1", [self.constant("w", 0), NONE, NONE, NONE, NONE], 0, mod=ADDRESS64, imm=self.local[results[0]])
            return
        if name == "__assertfail":
            self.op_trap([], [])
            return
        function = self.module.functions.get(name)
        if function is None:
            raise ParseError(f"no function {name} (calls through a register are not known)")
        if name in self.inlined:
            raise ParseError(f"{name} calls itself")
        if self.guard >= 0:
            raise ParseError("a call with a guard")
        self.instances += 1
        saved = (self.suffix, self.end_label, self.scopes, self.lookup_cache, dict(self.local), self.line)
        self.suffix = f"@{self.instances}"
        self.end_label = f"@end{self.instances}"
        self.lookup_cache = {}
        self.scopes = [saved[2][0]] if "%carry" in saved[2][0].registers else []
        for formal, actual in zip(function.results + function.params, results + given, strict=True):
            self.local[formal.name] = saved[4][actual]
        self.inlined.append(name)
        self.body(function)
        self.inlined.pop()
        self.labels[self.end_label] = len(self.code)
        self.suffix, self.end_label, self.scopes, self.lookup_cache, self.local, self.line = saved

    # ---- barriers

    def op_bar(self, mods: list[str], o: list[str], aligned: bool = True) -> None:
        if "warp" in mods:
            self.collective("warp.sync", [], 0, o[0])
            return
        if "cluster" in mods or "cta" not in mods and not any(m in ("sync", "arrive", "red") for m in mods):
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
        x = (x + [NONE] * 4)[:4] + [register]
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
        if n != 8 or m not in (8, 16) or types[1] not in kinds or types[2] not in kinds or "row" not in mods or mods.index("col") < mods.index("row"):
            raise ParseError("shape or types")
        each = {0: 2, 1: 2, 2: 1}.get(kinds[types[1]], 4)
        half = types[0] == "f16"
        counts = [(m // 8) * (1 if half else 2), k // (4 * each) * (m // 8), k // (4 * each), (m // 8) * (1 if half else 2)]
        if [len(part) for part in registers] != counts or (m == 8 and types[1] in ("f16", "bf16")):
            raise ParseError("shape or types")
        more = [self.source(r, "w") for part in registers for r in part]
        imm = m | n << 8 | k << 16 | kinds[types[1]] << 24 | kinds[types[2]] << 28 | int(half) << 32 | int("satfinite" in mods) << 33
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
        type = mods[-1].replace("b32", "u32") if mods[1] in ("add", "min", "max") else "b32"
        self.collective(f"redux.{mods[1]}.{type}", [self.destination(o[0], "W"), self.source(o[1], "w")], 1, o[2])

    def op_elect(self, mods: list[str], o: list[str]) -> None:
        self.collective("elect", self.pair(o[0]), 3, o[1])


def decode(module: ModuleText, name: str, names: dict[str, int], specials: dict[str, int], address_of: Callable[[str], int]) -> Program:
    """Everything about one kernel. `names`: the machine's handlers; `address_of`: where .global and .const variables lie."""
    function = module.kernels[name]
    d = Decoder(module, names, specials, address_of)
    static = 0
    unsized: list[tuple[str, int]] = []
    words = set(re.findall(r"[\w$]+", function.body))
    used = [v for v in module.variables["shared"].values() if v.name in words or any(v.name in f.body for f in module.functions.values())]
    for declaration in re.findall(r"\.shared\b[^;]*(?=;)", function.body):
        used += variables(declaration)[1] if re.match(r"\.shared\s+(\.align|\.[bsuf]\d)", declaration) else []
    for v in used:
        if v.size == 0:
            unsized.append((v.name, v.align))
        else:
            static = align(static, v.align)
            d.shared[v.name] = static
            static += v.size
    if unsized:
        static = align(static, max(16, *(a for _, a in unsized)))
        d.shared.update({n: static for n, _ in unsized})
    d.params = {p.name: p for p in function.params}
    d.body(function)
    d.line = function.line + function.body.count("\n")
    d.guard, d.opcode = NONE, "exit"
    d.op_exit([], [])  # falling off the end
    d.labels = {label: i for label, i in d.labels.items()}
    for r in d.code:
        for label in [str(r.target)] if r.control == BRANCH else r.labels:
            if label not in d.labels:
                raise ParseError(f"PTX line {r.line}: no label {label}")
    permanent = set(d.constants.values()) | set(d.specials.values())
    spans = allocate.lives(d.code, d.labels)
    offsets, size = allocate.cells(spans, [SIZE[c] for c in d.classes], permanent)
    return Program(
        d.code, d.labels, offsets, size, [(v, kind == "d", value) for (kind, value), v in d.constants.items()],
        [(v, specials[n]) for n, v in d.specials.items()], static, align(d.local_bytes, 16), d.granules["shared"], d.granules["global"],
    )  # fmt: skip
