"""`info`: what is installed, what can run here, and why the rest cannot; the plan of mode tensor."""

from __future__ import annotations

import argparse

from rerank_kernels.cli import terminal, writing
from rerank_kernels.cli.errors import InputError, fail_with
from rerank_kernels.cli.options import positive


def options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--plan", action="store_true", help="instead: what mode tensor does on a GPU: matrix instructions and tiles, as a table"
    )
    sub.add_argument(
        "--arch",
        type=positive,
        action="append",
        metavar="N",
        help="of --plan: architecture 80, 86, 89, 90, 100 or 120 (default: this machine's GPU, else 80 and 90)",
    )
    sub.add_argument(
        "--model", action="append", metavar="SHAPE", help="of --plan: shape:NAME (default: bge-reranker-base and -large)"
    )
    sub.add_argument(
        "--linear", type=positive, nargs=2, action="append", metavar=("N", "K"), help="of --plan: a weight [N, K] of your own"
    )
    sub.add_argument("--head", type=positive, action="append", metavar="D", help="of --plan: a head of D features")


def run(args: argparse.Namespace) -> int:
    if args.plan:
        return _plan(args)
    if args.arch or args.model or args.linear or args.head:
        raise InputError("--arch, --model, --linear and --head belong to --plan")
    from rerank_kernels.backend.native import hopper, proven
    from rerank_kernels.backend.registry import BACKENDS, backends
    from rerank_kernels.tables import Column, Table
    from rerank_kernels.verify import environment

    _try_hopper()
    _try_products()
    about = Table([Column("what"), Column("here")])
    for name, value in {"hopper": hopper.said(), "cublaslt": proven.said(), **environment()}.items():
        if isinstance(value, dict):
            value = "\n".join(f"{k}: {v}" for k, v in value.items())
        about.add_row(name, ", ".join(value) if isinstance(value, list) else str(value))
    rows = backends()
    table = Table([Column(name) for name in ("op", *BACKENDS)])
    reasons: dict[str, str] = {}
    for op, row in rows.rows():
        for name, reason in row.items():
            if reason != "yes":
                reasons.setdefault(name, reason)
        table.add_row(op, *("yes" if reason == "yes" else "-" for reason in row.values()))
    with writing.naming(writing.STDOUT):
        console = terminal.console()
        console.print(about, markup=False)
        console.print(table)
        for name, reason in reasons.items():
            console.print(f"{name}: {reason}", markup=False, soft_wrap=not console.is_terminal)
    return 0


def _try_hopper() -> None:
    """The trials of the kernels for Hopper on this machine's GPUs: a verdict lives no longer than its process."""
    import torch

    from rerank_kernels.backend import registry
    from rerank_kernels.backend.native import hopper

    if hopper.wrong() or not torch.cuda.is_available() or registry.missing("cuda") is not None:
        return
    for index in range(torch.cuda.device_count()):
        for launcher in hopper.OPS:
            hopper.before_a_call(launcher, torch.device("cuda", index))


def _try_products() -> None:
    """cuBLASLt's trials on this machine's GPU, at the products of two models: a verdict lives no longer than its process."""
    import torch

    from rerank_kernels.backend import registry
    from rerank_kernels.backend.native import proven
    from rerank_kernels.ops.linear import linear
    from rerank_kernels.verify.models import SHAPES

    if not proven.said().startswith("on") or not torch.cuda.is_available() or registry.missing("cuda") is not None:
        return
    sizes = [(s["hidden"], s["inner"]) for s in (SHAPES["bge-reranker-base"], SHAPES["bge-reranker-large"])]
    with registry.use("cuda"):
        for hidden, inner in sizes:
            for n, k in ((hidden, hidden), (inner, hidden), (hidden, inner)):
                weight, bias = (torch.zeros(*shape, dtype=torch.float16, device="cuda") for shape in ((n, k), (n,)))
                for rows in (128, 4096):
                    linear(weight.new_zeros(rows, k), weight, bias, mode="tensor")


def _plan(args: argparse.Namespace) -> int:
    import torch

    from rerank_kernels.backend.modes import TENSOR
    from rerank_kernels.backend.plan import ARCHITECTURES, cuda_gap, plan, triton_gap
    from rerank_kernels.tables import Column, Table
    from rerank_kernels.verify.models import SHAPE, SHAPES

    architectures = args.arch
    if architectures is None:
        here = {10 * major + minor for major, minor in map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))}
        architectures = sorted(here & set(ARCHITECTURES)) or [80, 90]
    linears, heads = [tuple(nk) for nk in args.linear or ()], list(args.head or ())
    models = args.model or ([] if linears or heads else ["shape:bge-reranker-base", "shape:bge-reranker-large"])
    for name in models:
        shape = SHAPES.get(name.removeprefix(SHAPE))
        if shape is None:
            raise InputError(f"--model {name}: no such shape; there are {', '.join(SHAPE + n for n in SHAPES)}")
        hidden, inner = shape["hidden"], shape["inner"]
        linears += [(hidden, hidden), (inner, hidden), (hidden, inner)]
        heads.append(hidden // shape["heads"])
    table = Table(
        [
            *map(Column, ("op", "features", "GPU", "backend", "instruction")),
            Column("in a sum", number=True),
            Column("tiles, rows x columns: threads, shared KB"),
        ],
        title=f"mode tensor, version {TENSOR.version}, fp16 and bf16, float32 sums",
    )
    try:
        for arch in architectures:
            for row in plan(arch, list(dict.fromkeys(linears)), list(dict.fromkeys(heads))):
                shown = ((t, f", {t.shared / 1024:.1f}" if t.shared else "") for t in row.tiles)
                tiles = [f"{t.rows}x{t.columns}: {t.threads}{kilobytes}" for t, kilobytes in shown]
                table.add_row(
                    row.op, row.features, f"sm_{row.arch}", row.backend, row.instruction, str(row.count), "; ".join(tiles)
                )
    except ValueError as error:
        fail_with(error)
    with writing.naming(writing.STDOUT):
        console = terminal.console()
        console.print(table)
        if lacks := cuda_gap():
            console.print(f"cuda: {lacks}", markup=False, soft_wrap=not console.is_terminal)
        for gap in dict.fromkeys(filter(None, map(triton_gap, architectures))):
            console.print(f"triton: {gap}", markup=False, soft_wrap=not console.is_terminal)
    return 0
