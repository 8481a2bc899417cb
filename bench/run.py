"""Times of rerank_kernels beside stock PyTorch's and two engines': python bench/run.py [--quick] [--only linear] [--json FILE]

First the gate: every op of the run is compared with its float64 truth and for batch invariance, on the very tensors that are
timed; if one fails, no time is printed. Then the contestants take turns (bench/clock.py). A bar is the least ratio this project
asks of itself (fp32, cpu backend, 2 threads); a ratio below its bar is reported as such and changes the exit code only with
--strict. Besides the contests there are three studies: peak memory, the bits that MKL's strict mode leaves unfixed, and what
each kernel reaches of what the machine can do.

Exit code: 0, or 1 if the gate fails (or, with --strict, a ratio falls short), 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import pathlib
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import engines
import limits
import memory
import ops
import rerankers
import serving
import strict
from clock import Contest, Missing, measure
from report import machine, write_json
from results import digits
from workers import Died

Results = list[dict[str, Any]]


def contests(quick: bool) -> dict[str, Callable[[], Contest]]:
    """Name -> how to build it; built when its turn comes, so that no two sets of weights are held at a time."""
    table = dict([*ops.listed(), *rerankers.listed(quick)])
    for name, build in table.items():
        if strict.chosen(name):
            bar = None if quick and name.startswith("bge") else strict.BAR
            table[name] = functools.partial(strict.away, build, name, quick, bar)
    return table


def studies(quick: bool) -> dict[str, tuple[str, Callable[[], Results]]]:
    """Name -> where the run's file keeps it, and how it is made."""
    layers, bar, cut = (2, None, " cut to 2 layers") if quick else (None, memory.BAR, "")
    return {
        f"memory of bge-reranker-base{cut}": ("memory", functools.partial(memory.measure, rerankers.BASE, layers, bar=bar)),
        "bits of ms-marco-MiniLM-L6-v2 in MKL's strict mode": ("bits", functools.partial(strict.bits, rerankers.MINILM)),
        "limits of the machine, and what each kernel reaches": (
            "limits",
            functools.partial(limits.measure, 0.2 if quick else 1.0),
        ),
        "serving: processes and callers that share the machine": (
            "serving",
            functools.partial(serving.measure, 0.5 if quick else 2.0),
        ),
    }


# ---- what is said about it -------------------------------------------------------------------------------------------------

VERDICTS = {"ok": "[green]ok[/]", "FALLS SHORT": "[bold red]FALLS SHORT[/]", None: ""}


def show(console: Console, facts: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> None:
    table = Table(caption="ratio: theirs / ours, above 1 we are faster; the gate passed for every line")
    for name in ("case", "against", "ours ms", "theirs ms", "ratio", "bar", "", "gpu"):
        numeric = name in ("ours ms", "theirs ms", "ratio", "bar")
        table.add_column(name, justify="right" if numeric else "left", no_wrap=True)
    for r in results:
        bar = "" if r["bar"] is None else f"{r['bar']:.2f}"
        if r["ratio"] is None:
            table.add_row(r["case"], r["against"], "-", "-", "-", bar, r["why"][:40], r["gpu"])
            continue
        times = digits(r["ours_ms"]), digits(r["theirs_ms"])
        table.add_row(r["case"], r["against"], *times, f"{r['ratio']:.2f}", bar, VERDICTS[r["verdict"]], r["gpu"])
    console.print(table)
    for why in sorted({f"{r['against']}: {r['why']}" for r in results if r["ratio"] is None}):
        console.print(why, markup=False, soft_wrap=True)
    console.print("   ".join(f"{k}: {v}" for k, v in facts.items()), soft_wrap=True)


def show_memory(console: Console, records: Results) -> None:
    table = Table()
    for name in ("model", "step", "ours", "stock", "ratio", "bar", ""):
        table.add_column(name, justify="right" if name in ("ours", "stock", "ratio", "bar") else "left")
    for r in records:
        sizes = f"{r['ours_mib']:.0f}", f"{r['stock_mib']:.0f}", f"{r['ratio']:.2f}"
        bar = "" if r["bar"] is None else f"{r['bar']:.2f}"
        table.add_row(r["model"], r["step"], *sizes, bar, VERDICTS[r["verdict"]])
    console.print("peak memory in MiB of a fresh process; ratio: ours / stock, below 1 ours takes less", highlight=False)
    console.print(table)


def show_bits(console: Console, records: Results) -> None:
    table = Table()
    for name in ("", *records[0]["differ"], "largest difference"):
        table.add_column(name, justify="right" if name else "left")
    for r in records:
        furthest = f"{r['furthest']:.1e}" if r["furthest"] else "0"
        table.add_row(f"{r['dtype']}, {r['way']}", *(f"{n}" for n in r["differ"].values()), furthest)
    pairs, model = records[0]["pairs"], records[0]["model"]
    console.print(f"of {pairs} pairs of {model}, those with other bits than alone, by what changed", highlight=False)
    console.print(table)


def show_limits(console: Console, records: Results) -> None:
    top, *kernels = records
    table = Table()
    for name in ("case", "fmas", "bytes", "limit ms", "by", "ms", "reached"):
        table.add_column(name, justify="left" if name in ("case", "by") else "right")
    for r in kernels:
        work = f"{r['fmas']:.3g}", f"{r['bytes']:.3g}", digits(r["limit_ms"])
        table.add_row(r["case"], *work, r["limited_by"], digits(r["ms"]), f"{r['reached']:.0%}")
    can = (
        f"{top['gflops']:.0f} GFLOP/s, {top['cache_gbs']:.0f} GB/s out of the cache, {top['memory_gbs']:.0f} GB/s out of memory"
    )
    console.print(f"this machine, {top['threads']} threads: {can}", highlight=False)
    console.print(table)


def show_serving(console: Console, records: Results) -> None:
    table = Table()
    for name in ("", *records[0]["rates"], "ours / stock"):
        table.add_column(name, justify="right" if name else "left")
    for r in records:
        table.add_row(r["way"], *(f"{rate:.1f}" for rate in r["rates"].values()), f"{r['ratio']:.2f}")
    console.print(
        f"pairs a second of {records[0]['model']}, one pair of 128 tokens a call, all processes together", highlight=False
    )
    console.print(table)


SHOWN = {"memory": show_memory, "bits": show_bits, "limits": show_limits, "serving": show_serving}


# ---- the run ---------------------------------------------------------------------------------------------------------------


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
    if table:
        console.print(f"gate: {len(table)} of {len(table)} right and batch-invariant")
    results = []
    for name, build in table.items():
        with _status(console, f"timing: {name}"):
            try:
                results += measure(name, build(), budget, at_least)
            except Died as error:  # in the middle of its turns: the other cases need not be lost
                console.print(f"{name}: not measured: {error}", markup=False, soft_wrap=True)
    return results


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
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments()
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
    return on_cpu(args, parser)


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
    facts = machine()
    if facts["load"] > 0.5 * facts["cores"]:
        out.print(f"[yellow]The machine is busy (load {facts['load']} on {facts['cores']} cores): times mean little.[/]")
    table = {n: every[n] for n in wanted if n in every}
    found: dict[str, Results] = {}
    try:
        with torch.no_grad():
            budget, at_least = (0.2, 3) if args.quick else (2.0, 5)
            results = run(table, budget=budget, at_least=at_least, console=out)
        if strict.used():
            facts["MKL_CBWR"] = f"{strict.setting()}, which MKL takes as {strict.says()}"
    finally:
        engines.close()
        strict.close()
    if results is None:
        return 1
    facts["peak memory MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    rerankers.forget()  # the studies' processes have the machine for themselves
    ops.ffn_weights.cache_clear()
    for name in (n for n in wanted if n in more):
        with _status(out, name):
            try:
                found[more[name][0]] = more[name][1]()
            except (Died, Missing) as error:
                out.print(f"{name}: not measured: {error}", markup=False, soft_wrap=True)
    if results:
        show(out, facts, results)
    for kind, records in found.items():
        SHOWN[kind](out, records)
    barred = [r for r in (*results, *found.get("memory", ())) if r["bar"] is not None]
    short = [r for r in barred if r["verdict"] == "FALLS SHORT"]
    if barred:
        reached = sum(r["verdict"] == "ok" for r in barred)
        without = len(barred) - reached - len(short)
        said = f"bars: {reached} of {len(barred)} reached"
        out.print(said + f", {len(short)} FALL SHORT" * bool(short) + f", {without} not measured" * bool(without))
    if args.json is not None:
        write_json(args.json, {"machine": facts, "quick": args.quick, "only": args.only, "results": results, **found})
        out.print(f"written: {args.json}", markup=False)
    return 1 if args.strict and short else 0


if __name__ == "__main__":
    sys.exit(main())
