"""python tools/witness [cuda] [triton] [--check | --write]: see the package."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:1] = [str(ROOT), str(ROOT / "tests")]  # instead of this folder, whose names are not for everyone


def main() -> int:
    import toolkit

    parser = argparse.ArgumentParser(
        prog="python tools/witness", description="Holds the compilers' PTX and machine code to the rules of NUMERICS.md."
    )
    parser.add_argument("backends", nargs="*", metavar="cuda | triton", help="whose kernels: both if none is named")
    parser.add_argument("--write", action="store_true", help="rewrite the generated parts of docs/GPU.md")
    parser.add_argument("--check", action="store_true", help="fail if docs/GPU.md is not what --write would write")
    parser.add_argument(
        "--arch", action="append", choices=toolkit.ARCHITECTURES, help="only this architecture; may be repeated"
    )
    args = parser.parse_args()
    if unknown := set(args.backends) - set(WITNESSES):
        parser.error(f"there is no witness of {', '.join(sorted(unknown))}; there are {' and '.join(WITNESSES)}")
    if args.arch and (args.write or args.check):
        parser.error("--write and --check are about all architectures: leave --arch out")
    return max(WITNESSES[name](args) for name in args.backends or WITNESSES)


def of_cuda(args: argparse.Namespace) -> int:
    import toolkit
    from tools.witness import kernels, page

    kit = toolkit.find()
    if kit is None:
        print("witness: no nvcc here: install a CUDA toolkit, or with pip", " ".join(toolkit.found.WHEELS))
        return 1
    found = kernels.every(tuple(args.arch or kernels.ARCHITECTURES))
    broken = [f"{k.name}, sm_{k.arch}: {defect}" for k in found for defect in k.defects()]
    print("\n".join(broken) or f"witness: {len(found)} kernels of nvcc {kit.release}, every rule holds")
    stale = (args.write or args.check) and placed(args, "witness", page.page(found), f"nvcc {kit.release}")
    return 1 if broken or stale else 0


def of_triton(args: argparse.Namespace) -> int:
    from rerank_kernels.backend import library
    from simulated import triton as simulated

    if reason := simulated.missing() or library.missing():  # the library holds the layouts of weights
        print("witness: triton:", reason)
        return 1
    import triton

    from tools.witness import triton_kernels, triton_page

    found = triton_kernels.every(tuple(a for a in triton_kernels.ARCHITECTURES if not args.arch or str(a) in args.arch))
    broken = [f"{p.name}, {p.what}, sm_{p.arch}: {d}" for p in found for d in p.defects()]
    print("\n".join(broken) or f"witness: {len(found)} programs of Triton {triton.__version__}, every rule holds")
    page = triton_page.page(found) if args.write or args.check else ""
    stale = page and placed(args, "witness-triton", page, f"Triton {triton.__version__}")
    return 1 if broken or stale else 0


def placed(args: argparse.Namespace, writer: str, tables: str, compiler: str) -> bool:
    """Writes the block of the page, or says whether it is stale. What another compiler made is not compared."""
    from tools import pages
    from tools.witness.page import PAGE

    if args.write:
        pages.write(PAGE, writer, {"tables": tables})
    elif not re.search(rf"^{re.escape(compiler)}(;| and)", pages.text(PAGE, writer, "tables"), re.MULTILINE):
        print(f"witness: docs/GPU.md was written with another compiler than {compiler}: not compared")
    elif pages.stale(PAGE, writer, {"tables": tables}):
        print("witness: docs/GPU.md is stale: run python tools/witness --write")
        return True
    return False


WITNESSES = {"cuda": of_cuda, "triton": of_triton}

if __name__ == "__main__":
    sys.exit(main())
