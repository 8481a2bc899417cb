"""Cases on a real GPU, for test_gpu.py, test_gpu_tensor.py and tools/gpu_report; as a program, what wants a process of its own.

python tests/gpu.py hash [float32 ...]        # a hash of every case's bits on backend cuda, in those dtypes, or in all
python tests/gpu.py hash-tensor cuda          # the same in mode tensor, on the backend that is named
python tests/gpu.py golden                    # writes golden_tensor.json: on an H100
python tests/gpu.py golden-simulated          # in it, what the simulator gives where no H100 gave a hash: on any machine
python tests/gpu.py compare FILE              # which of the simulator's models adds as the chip does that wrote FILE
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

import cases
import rerank_kernels as rk
import tensor
from cases import DTYPES, Case, Tensors
from golden import digest
from rerank_kernels.backend import registry
from rerank_kernels.backend.modes import TENSOR

TENSOR_FILE = Path(__file__).with_name("golden_tensor.json")


def on(device: str, case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    rows = {n: t.to(device) for n, t in case.make_rows(dtype).items()}
    shared = {n: t.to(device) for n, t in case.make_shared(dtype).items()}
    return tuple(t.cpu() for t in case.call(rows, shared))


def moved(t: Tensor) -> Tensor:
    """On the GPU, as far off a boundary and with the same gaps as here; what lies around is NaN."""
    if t.numel() == 0:
        return t.cuda()
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    nothing = float("nan") if t.is_floating_point() else 0
    base = torch.full((t.storage_offset() + span,), nothing, dtype=t.dtype, device="cuda")
    return base.as_strided(t.shape, t.stride(), t.storage_offset()).copy_(t)


class OnGpu(Case):
    """A case that is computed on the GPU; what goes in and comes out is on the CPU, where invariants.py looks at it."""

    def call(
        self,
        rows: Tensors,
        shared: Tensors,
        lengths: tuple[int, ...] | None = None,
        keys: tuple[int, ...] | None = None,
    ) -> tuple[Tensor, ...]:
        out = super().call(*({n: moved(t) for n, t in some.items()} for some in (rows, shared)), lengths, keys)
        return tuple(t.cpu() for t in out)

    def call_padded(self, rows: Tensors, shared: Tensors, masks: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        there = ({n: moved(t) for n, t in some.items()} for some in (rows, shared))
        return tuple(t.cpu() for t in super().call_padded(*there, {n: t.cuda() for n, t in masks.items()}))


def on_gpu(case: Case) -> OnGpu:
    return OnGpu(**{f.name: getattr(case, f.name) for f in dataclasses.fields(case)})


TENSOR_CASES = [on_gpu(case) for case in tensor.CASES]


def hashes(case: Case) -> dict[str, str]:
    """Of a case of mode tensor, in each of the mode's dtypes, by the backend that is in use."""
    return {str(d)[6:]: digest(*case.call(case.make_rows(d), case.make_shared(d))) for d in tensor.HALVES}


def compare(path: str) -> None:
    """Which of the simulator's models of an mma gives the sums that a chip gave."""
    kept = torch.load(path, weights_only=True)
    print(kept["gpu"])
    for p in kept["products"]:
        for model, how in tensor.MODELS.items():
            with tensor.simulated("cuda", model):
                y = rk.linear(p["x"], p["w"], out_dtype=torch.float32, mode="tensor")
            equal = int((y.view(torch.int32) == p["y"].view(torch.int32)).sum())
            print(f"{p['dtype']} K={p['k']}, model {model} ({how}): {equal} of {y.numel()} sums equal")


def golden_tensor() -> dict[str, tuple[dict[str, str], str]]:
    """The hashes of mode tensor that are written down, by case, and who gave them: an H100, or the simulator so far."""
    kept = json.loads(TENSOR_FILE.read_text())
    said = {"hashes": kept["gpu"], "simulated": "the simulator"}
    return {case: (found, by) for key, by in said.items() for case, found in kept[key].items()}


def write() -> None:
    """Writes the hashes of backend cuda on this GPU, which test_tensor.py holds the simulator to: run it on an H100."""
    with registry.use("cuda"):
        found = {str(c): hashes(c) for c in TENSOR_CASES}
    _write(torch.cuda.get_device_name(), found, {})


def write_simulated() -> None:
    """The same of the simulator, with tensor cores that add as an H100's do, for cases without a hash of the GPU's."""
    kept = json.loads(TENSOR_FILE.read_text())
    with tensor.simulated("cuda", tensor.H100):
        found = {
            str(c): {str(d)[6:]: digest(*c.call(c.make_rows(d), c.make_shared(d))) for d in tensor.HALVES}
            for c in tensor.CASES
            if str(c) not in kept["hashes"]
        }
    _write(kept["gpu"], kept["hashes"], found)


def _write(name: str, found: dict[str, dict[str, str]], simulated: dict[str, dict[str, str]]) -> None:
    content = {
        "how": "python tests/gpu.py golden, and golden-simulated",
        "version": TENSOR.version,
        "gpu": name,
        "hashes": found,
        "simulated": simulated,
    }
    TENSOR_FILE.write_text(json.dumps(content, indent=1) + "\n")


def main(command: str, *words: str) -> None:
    if command == "hash":
        wanted = [d for d in DTYPES if str(d)[6:] in words or not words]
        for c in cases.CASES:
            print(c, *(digest(*on("cuda", c, d)) for d in wanted))
    elif command == "hash-tensor":
        with registry.use(words[0]):
            for c in TENSOR_CASES:
                print(c, *hashes(c).values())
    elif command == "golden":
        write()
    elif command == "golden-simulated":
        write_simulated()
    elif command == "compare":
        compare(words[0])
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["help"]))
