"""Times of rerank_kernels beside stock PyTorch's, in one process: python bench/run.py [--quick] [--only linear] [--json FILE]

First the gate: every op of the run is compared with its float64 truth and for batch invariance, on the very tensors that are
timed; if one fails, no time is printed. Then the contestants take turns, ours, theirs, ours, theirs, so that a busy machine
hits both alike. ratio is the median over the rounds of theirs / ours: above 1 we are faster. A bar is the least ratio this
project asks of itself (fp32, cpu backend, 2 threads); a ratio below its bar is reported as such and changes the exit code
only with --strict.

Exit code: 0, or 1 if the gate fails (or, with --strict, a ratio falls short), 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

# the cases, their truths and the invariants are the tests' own: there is one table
sys.path.insert(0, str(pathlib.Path(__file__).parent))
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))

import shapes
from report import machine, write_json
from results import digits

import cases
import invariants
import rerank_kernels as rk

NOT_MEASURED = "not measured"  # in this run: --device cuda measures it, on a machine with a GPU
BASE = "BAAI/bge-reranker-base"
LOGIT_BOUND = 2.0e-5  # on logits of order 1, after 12 layers of float32: stock PyTorch itself is off by about 1e-6


@dataclass(frozen=True)
class Rival:
    name: str
    call: Callable[[], object]
    bar: float | None = None


@dataclass(frozen=True)
class Contest:
    """One line or more of the table: our call, the others', and the gate, which raises AssertionError if ours is wrong."""

    ours: Callable[[], object]
    rivals: Sequence[Rival]
    gate: Callable[[], None]
    best_bar: float | None = None  # against the fastest of several rivals


# ---- ops -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held(cases.Case):
    """A case of the tests whose tensors are made once: gate and clock see the same ones, and a weight is packed once."""

    dtype: torch.dtype = torch.float32
    held: dict[str, cases.Tensors] = field(default_factory=dict)

    def make_rows(self, dtype: torch.dtype, total: int | None = None, salt: str = "") -> cases.Tensors:
        if total not in (None, self.total) or salt:
            return super().make_rows(dtype, total, salt)
        if "rows" not in self.held:
            self.held["rows"] = super().make_rows(dtype)
        return self.held["rows"]

    def make_shared(self, dtype: torch.dtype) -> cases.Tensors:
        if "shared" not in self.held:
            self.held["shared"] = super().make_shared(dtype)
        return self.held["shared"]


Theirs = Callable[..., object]


def op_contest(case: Held, rival: str, theirs: Theirs, bar: float | None = None) -> Contest:
    """`theirs` is called with the case's rows and shared tensors by name."""
    rows, shared = case.make_rows(case.dtype), case.make_shared(case.dtype)

    def gate() -> None:
        invariants.right(case, case.dtype)
        invariants.batch_invariant(case, case.dtype)

    return Contest(
        functools.partial(case.call, rows, shared),
        [Rival(rival, functools.partial(theirs, **rows, **shared), bar)],
        gate,
    )


def linear(m: int, k: int, n: int, dtype: torch.dtype = torch.float32, bar: float | None = None) -> Contest:
    case = Held("linear", f"{m}x{k}x{n}", {"x": (k,)}, {"weight": (n, k)}, count=m, dtype=dtype)
    return op_contest(case, "F.linear", lambda x, weight: F.linear(x, weight), bar)


def linear_gelu(m: int, k: int, n: int) -> Contest:
    shared = {"weight": (n, k), "bias": (n,)}
    case = Held("linear", f"+ gelu {m}x{k}x{n}", {"x": (k,)}, shared, {"activation": "gelu"}, count=m)
    return op_contest(case, "F.gelu(F.linear)", lambda x, weight, bias: F.gelu(F.linear(x, weight, bias)))


def layer_norm(m: int, d: int, dtype: torch.dtype = torch.float32) -> Contest:
    rows = {"x": (d,), "residual": (d,)}
    case = Held("layer_norm", f"+ residual {m}x{d}", rows, {"weight": (d,), "bias": (d,)}, count=m, dtype=dtype)
    return op_contest(
        case, "F.layer_norm(x + r)", lambda x, residual, weight, bias: F.layer_norm(x + residual, (d,), weight, bias)
    )


def softmax(m: int, d: int) -> Contest:
    case = Held("softmax", f"{m}x{d}", {"x": (d,)}, options={"dim": -1}, count=m)
    return op_contest(case, "torch.softmax", lambda x: torch.softmax(x, -1))


def gelu(m: int, d: int, dtype: torch.dtype = torch.float32) -> Contest:
    case = Held("activation", f"gelu {m}x{d}", {"x": (d,)}, options={"kind": "gelu"}, count=m, dtype=dtype)
    return op_contest(case, "F.gelu", lambda x: F.gelu(x))


def attention(b: int, t: int, heads: int = 12, d: int = 64, dtype: torch.dtype = torch.float32) -> Contest:
    rows = dict.fromkeys("qkv", (heads, d))
    case = Held("attention", f"{b}x{t}, {heads} heads of {d}", rows, lengths=(t,) * b, dtype=dtype)

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(z.view(b, t, heads, d).transpose(1, 2) for z in (q, k, v)))

    return op_contest(case, "F.sdpa", theirs)


def sparse_ffn(k: int, f: int, *, gate: bool, active: float = 0.1, bar: float | None = None) -> Contest:
    """One token, and a bias that leaves exactly round(active * f) of its neurons above zero."""
    shared = {"up_weight": (f, k), "down_weight": (k, f), **({"gate_weight": (f, k)} if gate else {})}
    relu = "gate" if gate else "up"
    shared[f"{relu}_bias"] = (f,)
    case = Held("sparse_ffn", f"{'ReGLU' if gate else 'ReLU'} 1x{k}x{f}, {active:.0%} active", {"x": (k,)}, shared, count=1)
    x, tensors = case.make_rows(case.dtype)["x"], case.make_shared(case.dtype)
    wanted = round(active * f)
    before = (x.double() @ tensors[f"{relu}_weight"].double().t()).flatten()
    kept, dropped = before.topk(wanted + 1).values[-2:].tolist()
    tensors[f"{relu}_bias"].fill_(-(kept + dropped) / 2)

    def theirs(x: Tensor, up_weight: Tensor, down_weight: Tensor, **more: Tensor) -> Tensor:
        if gate:
            h = F.relu(F.linear(x, more["gate_weight"], more["gate_bias"])) * F.linear(x, up_weight)
        else:
            h = F.relu(F.linear(x, up_weight, more["up_bias"]))
        return F.linear(h, down_weight)

    contest = op_contest(case, "dense F.linear", theirs, bar)

    def checked() -> None:
        count = int((before + tensors[f"{relu}_bias"].double() > 0).sum())
        assert count == wanted, f"{case}: {count} neurons are active, want {wanted}"
        contest.gate()

    return Contest(contest.ours, contest.rivals, checked)


# ---- whole models ----------------------------------------------------------------------------------------------------------


@functools.cache
def models(name: str, layers: int) -> tuple[Any, Any]:
    """The stock model and its patched twin; they share every weight tensor."""
    stock = shapes.reranker(shapes.RERANKERS[name], layers=layers)
    ours = shapes.twin(stock)
    rk.patch(ours)
    return stock, ours


def model_truth(stock: Any, ids: Tensor) -> Tensor:
    """Logits of one unpadded row with everything but the (exact) word embedding in float64."""
    wide = shapes.twin(stock)
    encoder = wide.base_model
    words = encoder.embeddings.word_embeddings(ids[None]).double()
    others = [m for n, m in encoder.embeddings.named_children() if n != "word_embeddings"]
    for module in (*others, encoder.encoder, wide.classifier):
        for owner in module.modules():
            for key, p in list(owner._parameters.items()):
                if p is not None:
                    owner._parameters[key] = torch.nn.Parameter(p.double(), requires_grad=False)
    return wide(inputs_embeds=words).logits


def model_gate(name: str, stock: Any, ours: Any, rows: list[Tensor]) -> None:
    """A pair's logit: alone = in the batch = in the reversed, left-padded batch; and close to float64's."""
    shape = shapes.RERANKERS[name]
    full = ours(**shapes.padded(shape, rows)).logits
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    some = sorted({by_length[0], by_length[len(rows) // 2], by_length[-1], 0, len(rows) - 1})
    for i in some:
        alone = ours(**shapes.padded(shape, [rows[i]])).logits[0]
        invariants.same(alone, full[i], f"{name}, pair {i} alone against in the batch")
    few = [*reversed(by_length[: max(2, len(rows) // 4)])]
    turned = ours(**shapes.padded(shape, [rows[i] for i in few], left=True)).logits
    invariants.same(turned, full[few], f"{name}, {len(few)} pairs in another order, padded left, against in the batch")
    for i in {by_length[0], by_length[len(rows) // 2]}:
        error = float((full[i].double() - model_truth(stock, rows[i])[0]).abs().max())
        assert error <= LOGIT_BOUND, f"{name}, pair {i}: logit {error:.2g} from float64's, allowed {LOGIT_BOUND:.2g}"


def model(
    lengths: Sequence[int], layers: int, *, mixed: bool = False, bars: tuple[float | None, float | None] = (None, None)
) -> Contest:
    """The whole reranker. bars: against the one padded batch, and (mixed only) against the best of the three stock ways."""
    shape = shapes.RERANKERS[BASE]
    stock, ours = models(BASE, layers)
    rows = shapes.tokens(shape, tuple(lengths))
    batch = shapes.padded(shape, rows)

    def in_batches(of: int) -> Callable[[], list[Tensor]]:
        ordered = sorted(rows, key=len, reverse=True)
        batches = [shapes.padded(shape, ordered[i : i + of]) for i in range(0, len(rows), of)]
        return lambda: [stock(**b).logits for b in batches]

    rivals = [Rival("stock, padded" if mixed else "stock, SDPA", lambda: stock(**batch).logits, bars[0])]
    if mixed:
        rivals += [Rival("stock, sorted in 8s", in_batches(8)), Rival("stock, one by one", in_batches(1))]
    return Contest(
        lambda: ours(**batch).logits,
        rivals,
        lambda: model_gate(BASE, stock, ours, rows),
        best_bar=bars[1],
    )


# ---- the list --------------------------------------------------------------------------------------------------------------

HALVES = (torch.float16, torch.bfloat16)
PROJECTIONS = ((768, 768), (768, 3072), (3072, 768))  # K, N of a base encoder: attention, up, down


def contests(quick: bool) -> dict[str, Callable[[], Contest]]:
    """Name -> how to build it; built when its turn comes, so that no two sets of weights are held at a time."""
    table: dict[str, Callable[[], Contest]] = {}
    for k, n in PROJECTIONS:
        for m in (2048, 128, 16, 1):
            table[f"linear {m}x{k}x{n}"] = functools.partial(linear, m, k, n, bar=0.90 if m == 2048 else None)
    for dtype in HALVES:
        table[f"linear 2048x768x3072 {str(dtype)[6:]}"] = functools.partial(linear, 2048, 768, 3072, dtype)
    table["linear + gelu 2048x768x3072"] = functools.partial(linear_gelu, 2048, 768, 3072)
    for dtype in (torch.float32, torch.bfloat16):
        name = "" if dtype == torch.float32 else f" {str(dtype)[6:]}"
        table[f"layer_norm + residual 2048x768{name}"] = functools.partial(layer_norm, 2048, 768, dtype)
        table[f"activation gelu 2048x3072{name}"] = functools.partial(gelu, 2048, 3072, dtype)
    table["softmax 12288x128"] = functools.partial(softmax, 12288, 128)
    table["softmax 6144x512"] = functools.partial(softmax, 6144, 512)
    for t in (128, 256, 384, 512):
        table[f"attention {2048 // t}x{t}, 12 heads of 64"] = functools.partial(attention, 2048 // t, t)
    table["sparse_ffn ReLU 1x4096x11008, 10% active"] = functools.partial(sparse_ffn, 4096, 11008, gate=False, bar=3.0)
    table["sparse_ffn ReGLU 1x4096x11008, 10% active"] = functools.partial(sparse_ffn, 4096, 11008, gate=True, bar=3.0)
    # quick runs cut the model to two layers: every path is walked, but the times are no model's, and no bar is held to them
    layers = 2 if quick else shapes.RERANKERS[BASE].layers
    cut = " cut to 2 layers" if quick else ""
    mixed = f"{len(shapes.MIXED_LENGTHS)} of 16 to 512"
    for b, t in ((8, 128), (4, 512)):
        bars = (None if quick else 1.0, None)
        table[f"bge-reranker-base{cut}, {b}x{t}"] = functools.partial(model, (t,) * b, layers, bars=bars)
    bars = (None, None) if quick else (3.0, 1.0)
    table[f"bge-reranker-base{cut}, {mixed}"] = functools.partial(model, shapes.MIXED_LENGTHS, layers, mixed=True, bars=bars)
    return table


# ---- the clock -------------------------------------------------------------------------------------------------------------


def interleave(calls: Sequence[Callable[[], object]], budget: float, at_least: int) -> list[list[float]]:
    """Seconds per call, one list a contestant, all of one length: rounds of one turn each until `budget` seconds are spent."""
    first = [_clock(call, 1) for call in calls]
    again = [t if t > 1.0 else _clock(call, 1) for call, t in zip(calls, first, strict=True)]
    # a turn lasts about two milliseconds at least, so that the clock's own cost and the hand-over are noise
    repeats = [max(1, math.ceil(0.002 / max(t, 1e-7))) for t in again]
    rounds = [max(1, round(budget / sum(t * n for t, n in zip(again, repeats, strict=True))))]
    slow = sum(again) > 5.0
    count = min(200, max(rounds[0], min(at_least, 3) if slow else at_least))
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(count):
        for held, call, n in zip(times, calls, repeats, strict=True):
            held.append(_clock(call, n))
    return times


def _clock(call: Callable[[], object], n: int) -> float:
    start = time.perf_counter()
    for _ in range(n):
        call()
    return (time.perf_counter() - start) / n


def measure(name: str, contest: Contest, budget: float, at_least: int) -> list[dict[str, Any]]:
    """One record a rival, and one for the best of several."""
    ours, *theirs = interleave([contest.ours, *(r.call for r in contest.rivals)], budget, at_least)
    found = [(r.name, r.bar, t) for r, t in zip(contest.rivals, theirs, strict=True)]
    if len(found) > 1:
        best, _, times = min(found, key=lambda f: statistics.median(f[2]))
        found.append((f"the best: {best}", contest.best_bar, times))
    return [record(name, rival, ours, times, bar) for rival, bar, times in found]


def record(case: str, rival: str, ours: list[float], theirs: list[float], bar: float | None) -> dict[str, Any]:
    ratio = statistics.median(t / o for o, t in zip(ours, theirs, strict=True))
    return {
        "case": case,
        "against": rival,
        "ours_ms": statistics.median(ours) * 1e3,
        "theirs_ms": statistics.median(theirs) * 1e3,
        "ratio": ratio,
        "bar": bar,
        "verdict": None if bar is None else "ok" if ratio >= bar else "FALLS SHORT",
        "rounds": len(ours),
        "ours_all_ms": [t * 1e3 for t in ours],
        "theirs_all_ms": [t * 1e3 for t in theirs],
        "gpu": NOT_MEASURED,
    }


# ---- what is said about it -------------------------------------------------------------------------------------------------


def show(console: Console, facts: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> None:
    table = Table(caption="ratio: theirs / ours, above 1 we are faster; the gate passed for every line")
    for name in ("case", "against", "ours ms", "theirs ms", "ratio", "bar", "", "gpu"):
        numeric = name in ("ours ms", "theirs ms", "ratio", "bar")
        table.add_column(name, justify="right" if numeric else "left", no_wrap=True)
    for r in results:
        verdict = {"ok": "[green]ok[/]", "FALLS SHORT": "[bold red]FALLS SHORT[/]", None: ""}[r["verdict"]]
        bar = "" if r["bar"] is None else f"{r['bar']:.2f}"
        times = digits(r["ours_ms"]), digits(r["theirs_ms"])
        table.add_row(r["case"], r["against"], *times, f"{r['ratio']:.2f}", bar, verdict, r["gpu"])
    console.print(table)
    console.print("   ".join(f"{k}: {v}" for k, v in facts.items()), soft_wrap=True)


Results = list[dict[str, Any]]


def run(table: Mapping[str, Callable[[], Contest]], *, budget: float, at_least: int, console: Console) -> Results | None:
    """Gate for all, then times for all; None, and what was wrong on the console, if the gate falls."""
    wrong = []
    for name, build in table.items():
        with _status(console, f"gate: {name}"):
            try:
                build().gate()
            except AssertionError as error:
                wrong.append(f"{name}: {error}")
    if wrong:
        console.print("[bold red]The correctness gate fails; nothing was timed.[/]")
        for words in wrong:
            console.print(words, markup=False, soft_wrap=True)
        return None
    console.print(f"gate: {len(table)} of {len(table)} right and batch-invariant")
    results = []
    for name, build in table.items():
        with _status(console, f"timing: {name}"):
            results += measure(name, build(), budget, at_least)
    return results


@contextlib.contextmanager
def _status(console: Console, words: str) -> Iterator[None]:
    with console.status(words) if console.is_terminal else contextlib.nullcontext():
        yield


def console() -> Console:
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=150)  # a file or a pipe has no width of its own


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Times beside stock PyTorch's; a correctness gate comes first.")
    parser.add_argument("--quick", action="store_true", help="short turns, and whole models cut to two layers")
    parser.add_argument("--only", metavar="NAME", action="append", help="cases whose name contains NAME; may be given again")
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path, help="write every time and the machine's facts to FILE")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--threads", metavar="N", type=int, default=min(2, cores), help="CPU threads (default: %(default)s)")
    parser.add_argument("--strict", action="store_true", help="exit 1 if a ratio falls short of its bar")
    parser.add_argument("--list", action="store_true", help="print the names of the cases, run nothing")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: other cases, backends cuda and triton (bench/device.py)"
    )
    parser.add_argument(
        "--scaling", action="store_true", help="throughput over batch and length, bits over batch (bench/scaling.py)"
    )
    parser.add_argument("--against", metavar="REV", help="time another revision beside this one (bench/against.py)")
    parser.add_argument("--budget", metavar="S", type=float, help="with --device cuda: seconds (default: 240, 60 with --quick)")
    parser.add_argument("--no-compile", action="store_true", help="with --device cuda: leave torch.compile out")
    for hidden, kind in (("--worker", pathlib.Path), ("--share", str), ("--until", float)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)  # how bench/relay.py starts this file
    args = parser.parse_args(argv)
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    if args.json is not None and not args.json.resolve().parent.is_dir():
        parser.error(f"--json: there is no directory {args.json.resolve().parent}")
    if args.scaling:
        import scaling

        found = scaling.measure(args.device, console(), quick=args.quick)
        if args.json is not None:
            write_json(
                args.json, {"machine": machine(args.device), "quick": args.quick, "device": args.device, "scaling": found}
            )
        return 0
    if args.against is not None:
        import against

        records, code = against.main(args, console())
        if args.json is not None:
            write_json(args.json, {"machine": machine(args.device), "against": args.against, "results": records})
        return code
    if args.device == "cuda" or args.worker is not None:
        import relay

        args.budget = args.budget or (60.0 if args.quick else 240.0)
        return relay.main(args, sys.argv[1:] if argv is None else argv, console())
    every = contests(args.quick)
    table = {n: b for n, b in every.items() if not args.only or any(o in n for o in args.only)}
    if not table:
        parser.error(f"--only {' '.join(args.only)} names no case; there are:\n  " + "\n  ".join(every))
    if args.list:
        print("\n".join(table))
        return 0

    torch.set_num_threads(args.threads)
    out = console()
    facts = machine()
    if facts["load"] > 0.5 * facts["cores"]:
        out.print(f"[yellow]The machine is busy (load {facts['load']} on {facts['cores']} cores): times mean little.[/]")
    with torch.no_grad():
        budget, at_least = (0.2, 3) if args.quick else (3.0, 5)
        results = run(table, budget=budget, at_least=at_least, console=out)
    if results is None:
        return 1
    facts["peak memory MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    show(out, facts, results)
    short = [r for r in results if r["verdict"] == "FALLS SHORT"]
    barred = sum(r["bar"] is not None for r in results)
    if barred:
        out.print(f"bars: {barred - len(short)} of {barred} reached" + (f", {len(short)} FALL SHORT" if short else ""))
    if args.json is not None:
        write_json(args.json, {"machine": facts, "quick": args.quick, "results": results})
        out.print(f"written: {args.json}", markup=False)
    return 1 if args.strict and short else 0


if __name__ == "__main__":
    sys.exit(main())
