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

from bench.cases import contests, limits, memory, serving, shapes
from bench.harness import gpu, machine, worker
from bench.harness.turns import Missing, Pace, Work, play
from bench.pages.results import lines
from bench.pages.tables import show
from bench.rivals import engines, mkl
from tools.gpu_report.outcome import write

Results = list[dict[str, Any]]


def contested(quick: bool) -> dict[str, Callable[[], Work]]:
    """All of a CPU's contests, with MKL's strict setting as one more contestant where it is to be beaten."""
    table: dict[str, Callable[[], Work]] = {}
    for name, build in contests.listed("cpu", quick).items():
        table[name] = functools.partial(build, contests.place("cpu"))
        if mkl.chosen(name):
            bar = None if quick and name.startswith("bge") else mkl.BAR
            table[name] = functools.partial(mkl.away, table[name], name, quick, bar)
    return table


def studies(quick: bool) -> dict[str, tuple[str, Callable[[], Results]]]:
    """Name -> where the run's file keeps it, and how it is made."""
    layers, bar, cut = (2, None, " cut to 2 layers") if quick else (None, memory.BAR, "")
    base, minilm = shapes.shape(shapes.BASE, layers), shapes.RERANKERS[shapes.MINILM]
    return {
        f"memory of bge-reranker-base{cut}": ("memory", lambda: memory.measure(shapes.BASE, base, bar=bar)),
        "bits of ms-marco-MiniLM-L6-v2 in MKL's strict setting": ("bits", lambda: mkl.bits(minilm)),
        "limits of the machine, and what each kernel reaches": ("limits", lambda: limits.measure(0.2 if quick else 1.0)),
        "serving: processes and callers that share the machine": ("serving", lambda: serving.measure(0.5 if quick else 2.0)),
    }


def run(table: Mapping[str, Callable[[], Work]], pace: Pace, console: Console) -> Results | None:
    """Gate for all, then times for all; None, and what was wrong on the console, if the gate falls."""
    wrong = []
    for name, build in table.items():
        with _status(console, f"gate: {name}"):
            try:
                for c in build().contestants:
                    with c.around():
                        (c.gate or (lambda: None))()
            except AssertionError as error:
                wrong.append(f"{name}: {error}")
    if wrong:
        console.print("[bold red]The correctness gate fails; nothing was timed.[/]")
        console.print("\n".join(wrong), markup=False, soft_wrap=True)
        return None
    if table:
        console.print(f"gate: {len(table)} of {len(table)} right and batch-invariant")
    results = []
    for name, build in table.items():
        with _status(console, f"timing: {name}"):
            work = build()
            results.append(work.record(name, play(work, pace, gates=False)))
    return results


@contextlib.contextmanager
def _status(console: Console, words: str) -> Iterator[None]:
    with console.status(words) if console.is_terminal else contextlib.nullcontext():
        yield


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Times beside stock PyTorch's; a correctness gate comes first.")
    parser.add_argument("--quick", action="store_true", help="short turns, and whole models cut to two layers")
    parser.add_argument("--only", metavar="NAME", action="append", help="cases whose name contains NAME; may be given again")
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path, help="write every time and the machine's facts to FILE")
    threads = min(2, machine.cores())
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
    out = Console()
    out = out if out.is_terminal else Console(width=150)  # a file or a pipe has no width of its own
    try:
        found, code = chosen(args, parser, out)
    finally:
        engines.close()
        worker.close()
    if found and args.json is not None:
        write(args.json, {"quick": args.quick, "only": args.only, **found})
        print(f"written: {args.json}")
    return code


def chosen(args: argparse.Namespace, parser: argparse.ArgumentParser, out: Console) -> tuple[dict[str, Any], int]:
    """What the run's file holds, and the exit code."""
    if args.scaling:
        from bench.cases import scaling

        found = scaling.measure(args.device, out, quick=args.quick)
        return {"machine": machine.facts(args.device), "device": args.device, "scaling": found}, 0
    if args.against is not None:
        from bench.harness import against

        records = against.measured(args, out)
        slower = args.strict and any(r["verdict"] == "SLOWER" for r in records)
        content = {"machine": machine.facts(args.device), "against": args.against, "results": records}
        return content, int(slower or not any("ratio" in r for r in records))
    if args.device == "cuda":
        every = list(contests.listed("cuda", args.quick))
        more: dict[str, tuple[str, Callable[[], Results]]] = {}
    else:
        every, more = list(contested(args.quick)), studies(args.quick)
    wanted = [n for n in (*every, *more) if not args.only or any(o in n for o in args.only)]
    if not wanted:
        parser.error(f"--only {' '.join(args.only)} names no case; there are:\n  " + "\n  ".join((*every, *more)))
    if args.list:
        print("\n".join(wanted))
        return {}, 0
    if args.device == "cpu":
        return on_cpu(args, wanted, more, out)
    if why := gpu.absent():
        out.print("\n".join(f"{name}: not measured" for name in wanted), highlight=False)
        out.print(f"not measured: {why}")
        return {}, 2
    content = {"device": args.device, **gpu.measured(wanted, args, out)}
    show(out, content)
    out.print(f"{content['seconds']:.0f} s in all", highlight=False)
    wrong = any("wrong" in c for r in content["results"] for c in r["contestants"].values())
    return content, int(wrong or not content["results"])


def on_cpu(
    args: argparse.Namespace, wanted: Sequence[str], more: Mapping[str, tuple[str, Callable[[], Results]]], out: Console
) -> tuple[dict[str, Any], int]:
    torch.set_num_threads(args.threads)
    facts = machine.facts()
    if facts["load"] > 0.5 * facts["cores"]:
        out.print(f"[yellow]The machine is busy (load {facts['load']} on {facts['cores']} cores): times mean little.[/]")
    table = {n: build for n, build in contested(args.quick).items() if n in wanted}
    with torch.no_grad():
        results = run(table, Pace(0.2, 3, 10.0) if args.quick else Pace(2.0, 5, 10.0), out)
    if results is None:
        return {}, 1
    if any(mkl.NAME in name for r in results for name in r["contestants"]):
        facts |= {"MKL_CBWR": f"{mkl.environment()['MKL_CBWR']}, which MKL takes as {mkl.says()}"}
    facts["peak memory MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    for close in (engines.close, worker.close, contests.forget):
        close()  # the studies' processes have the machine for themselves
    content: dict[str, Any] = {"machine": facts, "results": results}
    for name in (n for n in wanted if n in more):
        with _status(out, name), torch.no_grad():
            try:
                content[more[name][0]] = more[name][1]()
            except Missing as error:
                out.print(f"{name}: not measured: {error}", markup=False, soft_wrap=True)
    show(out, content)
    barred = [line for r in results for line in lines(r)] + content.get("memory", [])
    verdicts = [line["verdict"] for line in barred if line["bar"] is not None]
    reached, short = verdicts.count("ok"), verdicts.count("FALLS SHORT")
    if verdicts:
        without = len(verdicts) - reached - short
        words = f", {short} FALL SHORT" * bool(short) + f", {without} not measured" * bool(without)
        out.print(f"bars: {reached} of {len(verdicts)} reached{words}")
    return content, int(args.strict and short > 0)


if __name__ == "__main__":
    sys.exit(main())
