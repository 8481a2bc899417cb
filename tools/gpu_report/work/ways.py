"""Every way of every launcher at the shapes of real models, beside cuBLAS and SDPA; all ways must give the bits of the first.

The cases, their gate and their rivals are bench/cases', the clock is bench/harness/turns.py's. Only the ways are added here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F

import invariants
from bench.cases import ops, shapes
from bench.harness import gpu
from bench.harness.turns import Contestant, DeviceLost, Pace, Work, play
from rerank_kernels.backend import registry
from tools.gpu_report.work import launchers
from tools.gpu_report.work.cases import cases, say

PACE = Pace(0.08, 5, 0.5)  # of all contestants of a case
Build = Callable[[ops.Place], Work]

LINEAR = {
    "base": ops.BASE_SIZES,
    "large": ops.LARGE_SIZES,
    "MiniLM": ((384, 384), (384, 1536), (1536, 384)),
}
HEADS = {"base": (12, 64), "large": (16, 64), "MiniLM": (12, 32)}
LENGTHS = {"32x128": (128,) * 32, "32x512": (512,) * 32, "mixed": shapes.MIXED_LENGTHS}
WIDTHS = (768, 1024, 384)


def table() -> dict[str, Build]:
    """Name -> case, what matters most first: half precision before float32, base before large before MiniLM."""
    found: dict[str, Build] = {}

    def linear(model: str, rows: tuple[int, ...], dtype: str) -> None:
        for m in rows:
            for k, n in LINEAR[model]:
                found[f"linear {m}x{k}x{n} {dtype}"] = functools.partial(ops.linear, m=m, k=k, n=n, dtype=dtype)

    def attention(model: str, dtype: str) -> None:
        heads, d = HEADS[model]
        for name, lengths in LENGTHS.items():
            found[f"attention {name} {heads}x{d} {dtype}"] = functools.partial(
                ops.attention, lengths=lengths, heads=heads, d=d, dtype=dtype
            )

    for model in ("base", "large"):
        linear(model, (4096, 128), "fp16")
        attention(model, "fp16")
    linear("base", (16384, 1024, 16, 1), "fp16")
    linear("base", (4096, 128), "fp32")
    attention("base", "fp32")
    linear("MiniLM", (4096, 128), "fp16")
    attention("MiniLM", "fp16")
    for d in WIDTHS:
        found[f"layer_norm 4096x{d} fp16"] = functools.partial(ops.layer_norm, m=4096, d=d, dtype="fp16")
        found[f"normalize 32x{d} fp32"] = functools.partial(over_rows, op="normalize", m=32, d=d)
    found["rms_norm 4096x1024 fp32"] = functools.partial(over_rows, op="rms_norm", m=4096, d=1024)
    found["softmax 49152x512 fp32"] = functools.partial(ops.softmax, m=49152, d=512)
    found["sum 4096x768 fp32"] = functools.partial(over_rows, op="sum", m=4096, d=768)
    linear("large", (16384, 1024, 16, 1), "fp16")
    linear("large", (4096, 128), "fp32")
    linear("base", (4096, 128), "bf16")
    attention("base", "bf16")
    return found


def over_rows(place: ops.Place, op: str, m: int, d: int) -> Work:
    """Ops of rows in float32 that bench has no case of."""
    options: dict[str, Any] = {"sum": {"dim": -1}, "rms_norm": {"eps": 1e-6, "offset": 0, "cast": "after"}}.get(op, {})
    shared = {"weight": (d,)} if op == "rms_norm" else {}
    stock: ops.Theirs = {
        "sum": lambda x: torch.sum(x, -1),
        "normalize": lambda x: F.normalize(x, dim=-1),
        "rms_norm": lambda x, weight: F.rms_norm(x, (d,), weight, 1e-6),
    }[op]
    made = ops.Op(op, f"{m}x{d}", {"x": (d,)}, shared, options, count=m, place=place)
    return ops.contest(made, {"eager": stock}, m * d, 2 * m * d)


def main(served_by: str, *only: str) -> None:
    if reason := registry.missing(served_by):
        sys.exit(f"backend {served_by}: {reason}")
    place = gpu.place("cuda", False)
    listed_cases = table()
    names = [n for n in listed_cases if all(word in n for word in only)]
    reached: set[str] = set()
    with torch.no_grad():
        for name in cases(names):
            for record in timed(name, listed_cases[name], place, served_by, reached):
                say(case=name, **record)
    here = {n for n in launchers.listed() if launchers.fits(n, torch.cuda.get_device_capability())}
    if served_by == "cuda" and not only and (untimed := here - reached):
        say(note=f"launchers with several ways that no case reached: {', '.join(sorted(untimed))}")


def timed(name: str, build: Build, place: ops.Place, served_by: str, reached: set[str]) -> list[dict[str, Any]]:
    """One record per contestant: this backend's, their ways, the rivals."""
    work = build(place)
    op = name.partition(" ")[0]
    contestants: list[Contestant] = []
    for one in work.contestants:
        if not one.ours:
            contestants.append(one)
            continue
        kept: list[object] = []
        backend, mode = one.name.split(" ")
        if backend != served_by:
            continue
        d = int(name.split("x")[-1].split(" ")[0]) if op == "attention" else 0
        contestants.append(remembering(one, kept))
        for launcher, count in ways(backend, op, mode, d).items():
            reached.add(launcher)
            words = "" if launcher == launchers.named(op, mode) or backend != "cuda" else f"{launcher} "
            for way in range(count):
                force = functools.partial(forced, backend, launcher, way)
                contestants.append(forced_to(one, kept, force, f"{words}{way}"))
    work = dataclasses.replace(work, contestants=contestants)
    try:
        found = play(work, PACE, begins=begun)
    except DeviceLost as error:
        sys.exit(f"the device's context is gone: {error}")
    return [flat(who, result, work) for who, result in found.items()]


def flat(who: str, result: dict[str, Any], work: Work) -> dict[str, Any]:
    """Of bench's result: a line without lists."""
    first, _, way = who.partition(", way ")
    backend, _, mode = first.partition(" ") if result["ours"] else (None, "", None)
    record: dict[str, Any] = {"who": who, "ours": result["ours"], "backend": backend, "mode": mode}
    room, _, number = way.rpartition(" ")
    record |= {"way": int(number) if way else None, "launcher": room or None}
    if "ms" not in result:
        return record | {k: result[k] for k in ("wrong", "error", "why") if k in result}
    times = sorted(result["all_ms"])
    record |= {"ms": result["ms"], "least_ms": times[0], "most_ms": times[-1], "call_ms": result.get("call_ms")}
    record["kernels_ms"] = result.get("kernels_ms")  # of a whole model
    return record | {
        "tflops": 2.0 * work.fmas / result["ms"] * 1e-9,
        "gbs": work.bytes / result["ms"] * 1e-6,
        "graph": result.get("graph"),
    }


def begun(who: str) -> None:
    """A sign of life, and if it is the last, the culprit."""
    print(who, file=sys.stderr, flush=True)


# ---- the ways of a launcher


def of_triton(op: str) -> Any:
    return importlib.import_module(f"{registry.BACKENDS['triton'].package}.{op}")


def ways(backend: str, op: str, mode: str, d: int) -> dict[str, int]:
    """Launcher -> how many there are; Triton's are an op's own. d: the features of a head."""
    capability = torch.cuda.get_device_capability()
    if backend == "cuda":
        return launchers.of(op, mode, launchers.listed(), capability)
    if op not in ("linear", "attention") or (op == "attention" and mode == "portable"):
        return {}
    module = of_triton(op)
    if mode == "portable":
        return {op: len(module.TILES)}
    return {op: len(module.tensor_tiles(*([d] if op == "attention" else []), int("{}{}".format(*capability))))}


@contextlib.contextmanager
def forced(backend: str, launcher: str, way: int) -> Iterator[None]:
    """Inside, the launcher takes this way for every call."""
    if backend == "cuda":
        with launchers.forced(launcher, way):
            yield
        return
    of_triton(launcher).force = way
    try:
        yield
    finally:
        of_triton(launcher).force = None


def remembering(one: Contestant, kept: list[object]) -> Contestant:
    """`one`, which leaves what it gives behind its gate, for its ways to be compared with."""

    def gate() -> None:
        if one.gate is not None:
            one.gate()
        kept.append(one.call(0))

    return dataclasses.replace(one, gate=gate)


def forced_to(one: Contestant, kept: list[object], force: Callable[[], AbstractContextManager[None]], way: str) -> Contestant:
    """The same call by this way, which must give the bits that are kept."""

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        with one.around(), force():
            yield

    def gate() -> None:
        assert kept, "its own choice is wrong: nothing to compare with"
        invariants.all_same(one.call(0), kept[0], f"way {way} against its own choice")  # type: ignore[arg-type]

    return Contestant(f"{one.name}, way {way}", one.call, around, gate, ours=True, graph=one.graph)
