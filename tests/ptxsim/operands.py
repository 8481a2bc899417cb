"""Operands of a kernel's instructions: names to virtual registers, immediates and special registers to constant ones."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from .allocate import NONE, Record
from .opcodes import Form
from .parse import BITS, ModuleText, ParseError, Variable, float_bits, integer

ONES = 0xFFFFFFFF
# What there is one of, or what a program may not depend on.
ZERO_SPECIALS = {
    *("%clock", "%clock64", "%clock_hi", "%globaltimer", "%globaltimer_lo", "%globaltimer_hi", "%smid", "%gridid"),
    *("%cluster_ctarank", "%current_graph_exec", "%cluster_ctaid.x", "%cluster_ctaid.y", "%cluster_ctaid.z"),
}
ONE_SPECIALS = {"%nsmid", "%cluster_nctarank", "%cluster_nctaid.x", "%cluster_nctaid.y", "%cluster_nctaid.z"}


@dataclass
class Scope:
    """Names of a { } block."""

    registers: dict[str, tuple[str, int]] = field(default_factory=dict)  # name -> type, virtual register
    patterns: dict[str, tuple[str, int]] = field(default_factory=dict)  # %r<100>: prefix -> type, count
    branch_tables: dict[str, list[str]] = field(default_factory=dict)


_ADDRESS = re.compile(r"\[\s*([\w$%.]+)\s*(?:([+-])\s*(-?\w+))?\s*\]\Z")
_NUMBERED = re.compile(r"(.*?[A-Za-z_$%])(\d+)\Z")


class Operands:
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

    def declare(self, scope: Scope, name: str, dtype: str) -> tuple[str, int]:
        bits = BITS[dtype]
        if bits == 128:
            raise ParseError("128-bit registers")
        scope.registers[name] = (dtype, self.new("p" if bits == 1 else "d" if bits == 64 else "w", bits))
        return scope.registers[name]

    def constant(self, kind: str, value: int) -> int:
        value &= (1 << 64) - 1 if kind == "d" else ONES
        key = (kind, value)
        if key not in self.constants:
            self.constants[key] = self.new(kind)
        return self.constants[key]

    def special(self, name: str, kind: str) -> int:
        if name in ZERO_SPECIALS:
            return self.constant(kind, 0)
        if name in ONE_SPECIALS or name == "WARP_SZ":
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

    def run_form(self, p: Form, operands: list[str]) -> None:
        if len(operands) != len(p.kinds):
            raise ParseError(f"{len(p.kinds)} operands wanted")
        x = [self.destination(operands[0], p.kinds[0])]
        for text, letter in zip(operands[1:], p.kinds[1:], strict=True):
            x.append(self.source(text, letter))
        self.emit(p.name, x, 1, mod=p.mod, imm=p.imm)
