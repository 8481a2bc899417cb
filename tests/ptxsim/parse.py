"""PTX text to its parts: kernels, functions, variables, statements. Instructions are told apart by decode.py."""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

BITS = {
    "pred": 1, "b8": 8, "s8": 8, "u8": 8, "b16": 16, "s16": 16, "u16": 16, "f16": 16, "bf16": 16, "b32": 32, "s32": 32,
    "u32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32, "tf32": 32, "b64": 64, "s64": 64, "u64": 64, "f64": 64, "f32x2": 64,
    "b128": 128, "e4m3": 8, "e5m2": 8,
}  # fmt: skip


class SimulatorError(RuntimeError):
    """The program did something that the simulator refuses or does not know; the text says what and where."""


class ParseError(SimulatorError):
    """The PTX text has something that the simulator does not know."""


@dataclass
class Variable:
    """A parameter, or a .shared, .global, .const or .local variable."""

    name: str
    type: str
    size: int  # bytes; 0: an array of unknown length
    align: int
    offset: int = 0
    values: list[int | tuple[str, int]] = field(default_factory=list)  # (symbol, offset) for an address


@dataclass
class Function:
    """A kernel or a device function; the body is still text."""

    name: str
    head: str
    body: str
    line: int  # of the body's first character
    params: list[Variable]
    results: list[Variable]


@dataclass
class Statement:
    kind: str  # "{" "}" "label" "directive" "instruction"
    text: str
    line: int


def align(x: int, to: int) -> int:
    return (x + to - 1) // to * to


def split_operands(text: str) -> list[str]:
    """At commas outside of braces and brackets."""
    if "{" not in text and "(" not in text:
        return [part.strip() for part in text.split(",")] if text else []
    out, depth, at = [], 0, 0
    for i, c in enumerate(text):
        if c in "{([":
            depth += 1
        elif c in "})]":
            depth -= 1
        elif c == "," and depth == 0:
            out.append(text[at:i].strip())
            at = i + 1
    out.append(text[at:].strip())
    return out


def without_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


_INTEGER = re.compile(r"[-+]?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)[uU]?\Z")


def integer(text: str) -> int | None:
    """An integer literal: decimal, hexadecimal, octal or binary."""
    if not _INTEGER.match(text):
        return None
    sign = -1 if text[0] == "-" else 1
    digits = text.lstrip("+-").rstrip("uU")
    if digits[:2] in ("0x", "0X"):
        return sign * int(digits, 16)
    if digits[:2] in ("0b", "0B"):
        return sign * int(digits, 2)
    return sign * int(digits, 8 if len(digits) > 1 and digits[0] == "0" else 10)


_PARAM = re.compile(
    r"\.(?:param|reg)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
    r"(?:\.ptr(?:\s*\.\w+)*?(?:\s*\.align\s+\d+)?\s+)?([\w$%]+)\s*(?:\[(\d+)\])?"
)
_VARIABLE = re.compile(
    r"\.(shared|global|const|local|param)\b\s*(?:\.attribute\([^)]*\)\s*)?"
    r"(?:\.align\s+(\d+)\s+)?(?:\.v([24])\s+)?\.(\w+)\s+(.*)\Z",
    re.S,
)


def parameters(text: str) -> list[Variable]:
    """A parameter list, laid out as PTX does: each at a multiple of its alignment."""
    out: list[Variable] = []
    offset = 0
    for part in split_operands(" ".join(text.split())):
        if not part:
            continue
        m = _PARAM.search(part)
        if not m:
            raise ParseError(f"parameter not understood: {part}")
        size = BITS[m[2]] // 8
        to = int(m[1] or size)
        offset = align(offset, to)
        out.append(Variable(m[3], m[2], size * int(m[4] or 1), to, offset))
        offset = out[-1].offset + out[-1].size
    return out


def _initial(text: str, dtype: str) -> list[int | tuple[str, int]]:
    values: list[int | tuple[str, int]] = []
    for word in re.findall(r"[-+\w.$%()]+(?:\s*\+\s*\d+)?", text.replace("{", " ").replace("}", " ").replace(",", " ")):
        literal = float_bits(word, dtype)
        number = integer(word) if literal is None else literal
        if number is not None:
            values.append(number)
            continue
        m = re.fullmatch(r"(?:generic\()?([\w$%]+)\)?(?:\s*\+\s*(\d+))?", word)
        if not m:
            raise ParseError(f"initial value not understood: {word}")
        values.append((m[1], int(m[2] or 0)))
    return values


def _bits(value: float, dtype: str) -> int:
    return int.from_bytes(struct.pack("<d" if dtype == "f64" else "<f", value), "little")


def float_bits(text: str, dtype: str) -> int | None:
    """The bits of a floating-point literal in `dtype`; None if it is none."""
    if text[:2] in ("0f", "0F") and len(text) == 10:
        bits = int(text[2:], 16)
        return bits if dtype != "f64" else _bits(struct.unpack("<f", struct.pack("<I", bits))[0], dtype)
    if text[:2] in ("0d", "0D") and len(text) == 18:
        bits = int(text[2:], 16)
        return bits if dtype != "f32" else _bits(struct.unpack("<d", struct.pack("<Q", bits))[0], dtype)
    if dtype in ("f32", "f64") and re.fullmatch(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?", text):
        return _bits(float(text), dtype)
    return None


def variables(text: str) -> tuple[str, list[Variable]]:
    """A declaration without its semicolon: state space and variables."""
    m = _VARIABLE.search(text)
    if not m:
        raise ParseError(f"declaration not understood: {text[:120]}")
    space, dtype = m[1], m[4]
    size = BITS[dtype] // 8 * int(m[3] or 1)
    out = []
    names, _, init = m[5].partition("=")
    for name in split_operands(names.strip()):
        n = re.fullmatch(r"([\w$%]+)\s*((?:\[\s*\d*\s*\]\s*)*)", name.strip())
        if not n:
            raise ParseError(f"declaration not understood: {text[:120]}")
        count = 1
        for dim in re.findall(r"\[\s*(\d*)\s*\]", n[2]):
            count *= int(dim) if dim else 0
        values = _initial(init.strip(), dtype) if init else []
        if values and count == 0:
            count = len(values)
        out.append(Variable(n[1], dtype, size * count, int(m[2] or size), values=values))
    return space, out


class ModuleText:
    """A PTX file. Bodies are cut out, not parsed: a file may hold hundreds of kernels of which one is run."""

    def __init__(self, text: str) -> None:
        self.lines = text.split("\n")
        source = without_comments(text)
        self.kernels: dict[str, Function] = {}
        self.functions: dict[str, Function] = {}
        self.variables: dict[str, dict[str, Variable]] = {"shared": {}, "global": {}, "const": {}}
        found = re.search(r"\.target\s+(\w+)", source)
        self.target = found[1] if found else ""
        found = re.search(r"\.version\s+([\d.]+)", source)
        self.version = found[1] if found else ""
        rest, at = [], 0
        for m in re.finditer(r"(?:\.(?:visible|weak|extern|common)\s+)*\.(entry|func)\b", source):
            if m.start() < at:
                continue
            rest.append(source[at : m.start()])
            at = self._function(source, m.end(), m[1] == "entry")
        rest.append(source[at:])
        top = re.sub(r"\.section\b.*?\{.*?\}", "", "".join(rest), flags=re.S)
        for declaration in top.split(";"):
            if re.search(r"\.(shared|global|const)\b", declaration):
                space, found_variables = variables(declaration.strip())
                for v in found_variables:
                    self.variables[space][v.name] = v

    def _function(self, source: str, begin: int, kernel: bool) -> int:
        m = re.compile(r"[{;]").search(source, begin)
        if not m:
            raise ParseError("a function without a body")
        if m.group() == ";":  # a prototype
            return m.end()
        depth, end = 0, m.start()
        for brace in re.compile(r"[{}]").finditer(source, m.start()):
            depth += 1 if brace.group() == "{" else -1
            if depth == 0:
                end = brace.start()
                break
        head, body = source[begin : m.start()], source[m.end() : end]
        line = source.count("\n", 0, m.end()) + 1
        if kernel:
            name = head.split("(")[0].split()[0]
            open_ = head.find("(")
            params = parameters(head[open_ + 1 : head.rindex(")")]) if open_ >= 0 else []
            self.kernels[name] = Function(name, head, body, line, params, [])
        else:
            h = re.match(r"\s*(?:\(([^)]*)\))?\s*([\w$]+)\s*(?:\(([^)]*)\))?", head)
            if not h:
                raise ParseError(f"function not understood: {head.strip()[:80]}")
            self.functions[h[2]] = Function(h[2], head, body, line, parameters(h[3] or ""), parameters(h[1] or ""))
        return end + 1


_PIECE = re.compile(r"\s*(?:([{}])|;|([\w$%]+):(?!:)|(\.(?:loc|file)\b[^\n]*)|([^;]+);)", re.S)


_BRANCH = re.compile(r"(.*\bbra(?:\.uni)?\s+)([\w$%]+)")


def statements(function: Function) -> list[Statement]:
    """The body, one statement after another. A label belongs to the braces around it: where several have one of a name, each
    gets a name of its own, and so do the branches to it.
    """
    found = list(_statements(function))
    labels = Counter(s.text for s in found if s.kind == "label")
    if all(count == 1 for count in labels.values()):
        return found
    braces, number, places = [0], 0, []
    for s in found:
        if s.kind == "{":
            number += 1
            braces.append(number)
        elif s.kind == "}":
            braces.pop()
        places.append(tuple(braces))
    there = {(s.text, at[-1]) for s, at in zip(found, places, strict=True) if s.kind == "label"}

    def own(label: str, at: tuple[int, ...]) -> str:
        brace = next((b for b in reversed(at) if (label, b) in there), 0)
        return f"{label}@{brace}" if labels[label] > 1 else label

    out = []
    for s, at in zip(found, places, strict=True):
        text = s.text
        if s.kind == "label":
            text = own(text, at)
        elif s.kind == "instruction" and (branch := _BRANCH.fullmatch(text)):
            text = branch[1] + own(branch[2], at)
        out.append(Statement(s.kind, text, s.line))
    return out


def _statements(function: Function) -> Iterator[Statement]:
    body, line, at = function.body, function.line, 0
    end = len(body.rstrip())
    while at < end:
        m = _PIECE.match(body, at)
        if not m:
            raise ParseError(f"line {line}: not understood: {body[at : at + 80].strip()}")
        kind = m.lastindex or 0
        if kind:
            here = line + body.count("\n", at, m.start(kind))
            text = m[kind]
            if kind == 1:
                yield Statement(text, text, here)
            elif kind == 2:
                yield Statement("label", text, here)
            elif kind == 4:
                text = " ".join(text.split())
                yield Statement("directive" if text[0] == "." else "instruction", text, here)
        line += body.count("\n", at, m.end())
        at = m.end()
