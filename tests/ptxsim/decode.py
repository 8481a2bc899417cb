"""A kernel's statements to the records that the machine runs.

Device functions are inlined where they are called; call parameters live in the thread's local memory.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

from . import allocate
from .allocate import NONE, Record
from .asynchronous import Asynchronous, watch
from .instructions import ADDRESS64, BRANCH
from .opcodes import form
from .operands import Scope
from .parse import Function, ModuleText, ParseError, align, parameters, split_operands, statements, variables

SIZE = {"p": 4, "w": 128, "d": 256}


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
    watched: int  # registers that wgmmas use
    touches: list[list[int]]  # of each instruction, those among them: 2 * number + written


_OPERATION = re.compile(r"(?:@(!?)\s*([\w$%]+)\s+)?([\w.:]+)\s*(.*)\Z", re.S)


class Decoder(Asynchronous):
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
            for v in variables(text)[1] if text.startswith(".local") else parameters(text):
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
        p = form(opcode, len(operands))
        if p:
            self.run_form(p, operands)
            return
        parts = opcode.split(".")
        method = getattr(self, "op_" + parts[0], None)
        if method is None:
            raise ParseError("unknown instruction")
        method(parts[1:], operands)

    # ---- calls

    def op_call(self, mods: list[str], o: list[str]) -> None:
        results = [] if o[0][0] != "(" else [r.strip() for r in o[0][1:-1].split(",") if r.strip()]
        name, arguments = (o[1], o[2:]) if o[0][0] == "(" else (o[0], o[1:])
        given = [a.strip() for a in arguments[0][1:-1].split(",") if a.strip()] if arguments else []
        if name == "vprintf":
            self.emit(
                "st.local.32x1", [self.constant("w", 0), NONE, NONE, NONE, NONE], 0, mod=ADDRESS64, imm=self.local[results[0]]
            )
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


def decode(
    module: ModuleText, name: str, names: dict[str, int], specials: dict[str, int], address_of: Callable[[str], int]
) -> Program:
    """Everything about one kernel. `names`: the machine's handlers; `address_of`: where .global and .const variables lie."""
    function = module.kernels[name]
    d = Decoder(module, names, specials, address_of)
    static = 0
    unsized: list[tuple[str, int]] = []
    words = set(re.findall(r"[\w$]+", function.body))
    used = [
        v
        for v in module.variables["shared"].values()
        if v.name in words or any(v.name in f.body for f in module.functions.values())
    ]
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
    # A wgmma in flight reads and writes its registers until it is waited for: no other may have their cells.
    watched, touches = watch(d.code)
    permanent = set(d.constants.values()) | set(d.specials.values()) | set(watched)
    spans = allocate.lives(d.code, d.labels)
    offsets, size = allocate.cells(spans, [SIZE[c] for c in d.classes], permanent)
    return Program(
        code=d.code,
        labels=d.labels,
        offsets=offsets,
        file_bytes=size,
        constants=[(v, kind == "d", value) for (kind, value), v in d.constants.items()],
        specials=[(v, specials[n]) for n, v in d.specials.items()],
        static_shared=static,
        local_bytes=align(d.local_bytes, 16),
        shared_granule=d.granules["shared"],
        global_granule=d.granules["global"],
        watched=len(watched),
        touches=touches,
    )
