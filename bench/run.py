"""Times of rerank_kernels beside stock PyTorch's and two engines': python bench/run.py [--quick] [--only linear] [--json FILE]

First the gate: every op of the run is compared with its float64 truth and for batch invariance, on the very tensors that are
timed; if one fails, no time is printed. Then the contestants take turns (harness/turns.py). A bar is the least ratio this
project asks of itself (fp32, cpu backend, 2 threads); a ratio below its bar is reported as such and changes the exit code only
with --strict. Besides the contests there are four studies: peak memory, the bits that MKL's strict setting leaves unfixed, what
each kernel reaches of what the machine can do, and a machine that is shared.

Exit code: 0, or 1 if the gate fails (or, with --strict, a ratio falls short), 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import pathlib
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # where this folder is the package `bench`

from bench.cases import decoders, limits, memory, models, ops, serving
from bench.cases.contests import on_a_cpu
from bench.harness import files
from bench.harness.turns import Missing, Pace, Work, play
from bench.harness.worker import Died
from bench.pages.results import lines
from bench.pages.tables import STUDIES, cpu
from bench.rivals import engines, mkl

Results = list[dict[str, Any]]


def contests(quick: bool) -> dict[str, Callable[[], Work]]:
    """All of on_a_cpu, with MKL's strict setting as one more contestant where it is to be beaten."""
    table = on_a_cpu(quick)
    for name, build in table.items():
        if mkl.chosen(name):
            bar = None if quick and name.startswith("bge") else mkl.BAR
            table[name] = functools.partial(mkl.away, build, name, quick, bar)
    return table


def studies(quick: bool) -> dict[str, tuple[str, Callable[[], Results]]]:
    """Name -> where the run's file keeps it, and how it is made."""
    layers, bar, cut = (2, None, " cut to 2 layers") if quick else (None, memory.BAR, "")
    of_memory = functools.partial(memory.measure, models.BASE, layers, bar=bar)
    of_limits = functools.partial(limits.measure, 0.2 if quick else 1.0)
    of_serving = functools.partial(serving.measure, 0.5 if quick else 2.0)
    return {
        f"memory of bge-reranker-base{cut}": ("memory", of_memory),
        "bits of ms-marco-MiniLM-L6-v2 in MKL's strict setting": ("bits", functools.partial(mkl.bits, models.MINILM)),
        "limits of the machine, and what each kernel reaches": ("limits", of_limits),
        "serving: processes and callers that share the machine": ("serving", of_serving),
    }


def run(table: Mapping[str, Callable[[], Work]], pace: Pace, console: Console) -> Results | None:
    """Gate for all, then times for all; None, and what was wrong on the console, if the gate falls."""
    wrong = []
    for name, build in table.items():
        with _status(console, f"gate: {name}"):
            for c in (c for c in build().contestants if c.gate is not None):
                try:
                    with c.around():
                        c.gate()
                except AssertionError as error:
                    wrong.append(f"{name}: {error}")
    if wrong:
        console.print("[bold red]The correctness gate fails; nothing was timed.[/]")
        for words in wrong:
            console.print(words, markup=False, soft_wrap=True)
        return None
    if table:
        console.print(f"gate: {len(table)} of {len(table)} right and batch-invariant")
    results = []
    for name, build in table.items():
        with _status(console, f"timing: {name}"):
            work = build()
            cells = play(work, pace, gates=False)
            results.append({"case": name, **work.about, "flops": 2.0 * work.fmas, "bytes": work.bytes, "contestants": cells})
    return results


def show(console: Console, facts: Mapping[str, Any], results: Results) -> None:
    about = "theirs / ours: above 1 ours is faster; the gate passed for every line"
    cpu({"results": results})._replace(about=about).show(console)
    for why in sorted({f"{line['against']}: {line['why']}" for r in results for line in lines(r) if line["ratio"] is None}):
        console.print(why, markup=False, soft_wrap=True)
    console.print("   ".join(f"{k}: {v}" for k, v in facts.items()), soft_wrap=True)


@contextlib.contextmanager
def _status(console: Console, words: str) -> Iterator[None]:
    with console.status(words) if console.is_terminal else contextlib.nullcontext():
        yield


def console() -> Console:
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=150)  # a file or a pipe has no width of its own


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Times beside stock PyTorch's; a correctness gate comes first.")
    parser.add_argument("--quick", action="store_true", help="short turns, and whole models cut to two layers")
    parser.add_argument("--only", metavar="NAME", action="append", help="cases whose name contains NAME; may be given again")
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path, help="write every time and the machine's facts to FILE")
    threads = min(2, files.cores())
    parser.add_argument("--threads", metavar="N", type=int, default=threads, help="CPU threads (default: %(default)s)")
    parser.add_argument("--strict", action="store_true", help="exit 1 if a ratio falls short of its bar")
    parser.add_argument("--list", action="store_true", help="print the names of the cases, run nothing")
    on_gpu = "cuda: other cases, backends cuda and triton (harness/gpu.py)"
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help=on_gpu)
    scaling = "throughput over batch and length, bits over batch (cases/scaling.py)"
    parser.add_argument("--scaling", action="store_true", help=scaling)
    parser.add_argument("--against", metavar="REV", help="time another revision beside this one (harness/against.py)")
    parser.add_argument("--budget", metavar="S", type=float, help="with --device cuda: seconds (default: 240, 60 with --quick)")
    parser.add_argument("--no-compile", action="store_true", help="with --device cuda: leave torch.compile out")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments()
    args = parser.parse_args(argv)
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    if args.json is not None and not args.json.resolve().parent.is_dir():
        parser.error(f"--json: there is no directory {args.json.resolve().parent}")
    if args.scaling:
        from bench.cases import scaling

        found = scaling.measure(args.device, console(), quick=args.quick)
        content = {"machine": files.machine(args.device), "quick": args.quick, "device": args.device, "scaling": found}
        return _written(args, content, 0)
    if args.against is not None:
        from bench.harness import against

        records, code = against.main(args, console())
        return _written(args, {"machine": files.machine(args.device), "against": args.against, "results": records}, code)
    if args.device == "cuda":
        from bench.harness import gpu

        return gpu.main(args, console())
    return on_cpu(args, parser)


def _written(args: argparse.Namespace, content: Mapping[str, Any], code: int) -> int:
    if args.json is not None:
        files.write_json(args.json, content)
        print(f"written: {args.json}")
    return code


def on_cpu(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    every, more = contests(args.quick), studies(args.quick)
    wanted = [n for n in (*every, *more) if not args.only or any(o in n for o in args.only)]
    if not wanted:
        parser.error(f"--only {' '.join(args.only)} names no case; there are:\n  " + "\n  ".join((*every, *more)))
    if args.list:
        print("\n".join(wanted))
        return 0

    torch.set_num_threads(args.threads)
    out = console()
    facts = files.machine()
    if facts["load"] > 0.5 * facts["cores"]:
        out.print(f"[yellow]The machine is busy (load {facts['load']} on {facts['cores']} cores): times mean little.[/]")
    found: dict[str, Results] = {}
    try:
        with torch.no_grad():
            pace = Pace(0.2, 3, 10.0) if args.quick else Pace(2.0, 5, 10.0)
            results = run({n: every[n] for n in wanted if n in every}, pace, out)
        if mkl.used():
            facts["MKL_CBWR"] = f"{mkl.setting()}, which MKL takes as {mkl.says()}"
    finally:
        engines.close()
        mkl.close()
    if results is None:
        return 1
    facts["peak memory MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    decoders.stacks.cache_clear()
    models.forget()  # the studies' processes have the machine for themselves
    ops.forget()
    for name in (n for n in wanted if n in more):
        with _status(out, name), torch.no_grad():
            try:
                found[more[name][0]] = more[name][1]()
            except (Died, Missing) as error:
                out.print(f"{name}: not measured: {error}", markup=False, soft_wrap=True)
    if results:
        show(out, facts, results)
    for kind in found:
        STUDIES[kind]({"machine": facts, **found}).show(out)
    barred = [line for r in results for line in lines(r)] + found.get("memory", [])
    barred = [line for line in barred if line["bar"] is not None]
    short = sum(line["verdict"] == "FALLS SHORT" for line in barred)
    if barred:
        reached = sum(line["verdict"] == "ok" for line in barred)
        without = len(barred) - reached - short
        said = f"bars: {reached} of {len(barred)} reached"
        out.print(said + f", {short} FALL SHORT" * bool(short) + f", {without} not measured" * bool(without))
    content = {"machine": facts, "quick": args.quick, "only": args.only, "results": results, **found}
    return _written(args, content, 1 if args.strict and short else 0)


if __name__ == "__main__":
    sys.exit(main())
