"""ONNX Runtime and OpenVINO on the same model and pairs as ours, each in a process of its own with the run's threads.

The model is exported once a run (torch.onnx, dynamic batch and length), with the very weights that ours has. "plain" has
attention written out: of that OpenVINO made a model 5 to 10 % faster than of SDPA's graph, ONNX Runtime one as fast. "fused" is
ONNX Runtime at its best: its transformer optimiser (model type bert) finds layer norms and GELU in what is exported but, in
transformers 5's graph, no attention, with either implementation; so attention goes into the export as the one node that the
optimiser would make of it, MultiHeadAttention with a key mask. OpenVINO is held to float32.

Before an engine is timed some of its logits are compared with float64's (cases/models.py). An engine that is not installed has
a row that says so.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.cases import shapes
from bench.harness.turns import AWAKE, Missing
from bench.harness.worker import PAUSE, Died, Ready, Worker

ENGINES = {  # name -> how the model is exported, and the package
    "ONNX Runtime": ("plain", "onnxruntime"),
    "ONNX Runtime, fused": ("fused", "onnxruntime"),
    "OpenVINO": ("plain", "openvino"),
}
NEEDED = ("onnx", "onnxscript")  # by the export, besides the engine
INSTALL = "pip install -e '.[engines]'"


@dataclass(frozen=True)
class Question:
    """A case: the pairs, how many go into a batch, and those whose logits are wanted for a check."""

    shape: shapes.Shape
    layers: int
    lengths: tuple[int, ...]
    of: int
    check: tuple[int, ...]


# ---- the run's side --------------------------------------------------------------------------------------------------------

_workers: dict[str, Worker] = {}
_exported: dict[tuple[shapes.Shape, int, str], pathlib.Path] = {}
_folders: list[tempfile.TemporaryDirectory[str]] = []


def missing(engine: str) -> str | None:
    lacking = [p for p in (ENGINES[engine][1], *NEEDED) if importlib.util.find_spec(p) is None]
    return f"not installed: {', '.join(lacking)} ({INSTALL})" if lacking else None


def ready(engine: str, asked: Question, right: Callable[[Mapping[int, Tensor]], None]) -> Callable[[int], float]:
    """`right` is given some pairs' logits and raises AssertionError if they are wrong."""
    if why := missing(engine):
        raise Missing(why)
    file = _export(asked.shape, asked.layers, ENGINES[engine][0])
    if engine not in _workers:
        _workers[engine] = Worker(pause=PAUSE, awake=AWAKE)
    what = {**dataclasses.asdict(asked), "engine": engine, "file": str(file), "threads": torch.get_num_threads()}
    try:
        said = _workers[engine].ask(f"{__name__}:prepare", **what)
    except Died as error:
        del _workers[engine]
        raise Missing(f"failed: {error}") from error
    if "error" in said:
        raise Missing(f"failed: {said['error']}")
    right({int(i): torch.tensor(logit) for i, logit in said["logits"].items()})
    return _workers[engine].turn


def _export(shape: shapes.Shape, layers: int, how: str) -> pathlib.Path:
    """In a process of its own: tracing takes memory, and changes what transformers knows of attention."""
    if (shape, layers, how) not in _exported:
        for old in [key for key in _exported if key[2] == how]:
            _exported.pop(old)
        _folders.append(tempfile.TemporaryDirectory())
        file = pathlib.Path(_folders[-1].name) / f"{how}.onnx"
        worker = Worker()
        try:
            said = worker.ask(f"{__name__}:export", shape=dataclasses.asdict(shape), layers=layers, how=how, file=str(file))
        except Died as error:
            said = {"error": str(error)}
        finally:
            worker.close()
        if "error" in said:
            raise Missing(f"the export failed: {said['error']}")
        _exported[shape, layers, how] = file
    return _exported[shape, layers, how]


def close() -> None:
    """Ends the processes and removes the exported models."""
    while _workers:
        _workers.popitem()[1].close()
    _exported.clear()
    while _folders:
        _folders.pop().cleanup()


# ---- the export ------------------------------------------------------------------------------------------------------------


class _Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def export(shape: Mapping[str, Any], layers: int, how: str, file: str) -> dict[str, Any]:
    of = shapes.Shape(**shape)
    model = shapes.reranker(of, layers=layers)
    if how == "fused":
        _attention_as_one_node(model)
    else:
        model.set_attn_implementation("eager")
    batch = shapes.padded(of, shapes.tokens(of, (9, 17, 12)))
    names = ["input_ids", "attention_mask"]
    sizes = {0: torch.export.Dim("batch", min=1, max=4096), 1: torch.export.Dim("length", min=2, max=512)}
    traced = pathlib.Path(file).with_suffix(".traced.onnx" if how == "fused" else ".onnx")
    torch.onnx.export(
        _Logits(model).eval(),  # else the export leaves dropout in
        tuple(batch[n] for n in names),
        str(traced),
        dynamo=True,
        dynamic_shapes=dict.fromkeys(names, sizes),
        input_names=names,
        output_names=["logits"],
        external_data=True,
        verbose=False,
    )
    if how == "fused":
        from onnxruntime.transformers import optimizer
        from onnxruntime.transformers.fusion_options import FusionOptions

        how_ = {"model_type": "bert", "opt_level": 0, "optimization_options": FusionOptions("bert")}
        better = optimizer.optimize_model(str(traced), num_heads=of.heads, hidden_size=of.hidden, **how_)
        better.save_model_to_file(file, use_external_data_format=True)
        for part in traced.parent.glob(f"{traced.name}*"):
            part.unlink()
    return {}


def _attention_as_one_node(model: Any) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **_: Any) -> tuple[Tensor, None]:
        b, heads, t, d = q.shape
        flat = [z.transpose(1, 2).reshape(b, t, heads * d) for z in (q, k, v)]
        out = torch.onnx.ops.symbolic(
            "com.microsoft::MultiHeadAttention",
            (*flat, None, mask),
            attrs={"num_heads": heads},
            dtype=torch.float32,
            shape=(b, t, heads * d),
            version=1,
        )
        return out.view(b, t, heads, d), None

    def keys(*_: Any, attention_mask: Tensor, **__: Any) -> Tensor:
        return attention_mask.to(torch.int32)

    AttentionInterface.register("onnx_node", attention)
    AttentionMaskInterface.register("onnx_node", keys)
    model.set_attn_implementation("onnx_node")


# ---- the contestant's process ----------------------------------------------------------------------------------------------

Inputs = Mapping[str, Any]


def _onnxruntime(file: str, threads: int) -> Callable[[Inputs], Any]:
    import onnxruntime

    # By default all graph optimisations are on, and threads spin between nodes. Alone in its process, told to sleep instead
    # (session.intra_op.allow_spinning), it took a sixth longer for one pair and as long for batches.
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)[0]


def _openvino(file: str, threads: int) -> Callable[[Inputs], Any]:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(file, "CPU", settings)
    return lambda inputs: compiled(inputs)[0]


@functools.lru_cache(1)
def _loaded(engine: str, file: str, threads: int) -> Callable[[Inputs], Any]:
    return (_openvino if engine == "OpenVINO" else _onnxruntime)(file, threads)


def prepare(
    engine: str, file: str, threads: int, shape: Mapping[str, Any], layers: int, lengths: list[int], of: int, check: list[int]
) -> Ready:
    asked = shapes.Shape(**shape)
    run = _loaded(engine, file, threads)
    rows = shapes.tokens(asked, tuple(lengths))
    made = [{n: t.numpy() for n, t in batch.items()} for batch in shapes.batches(asked, rows, of)]

    def call(i: int) -> list[Any]:
        return [run(batch) for batch in made]

    logits = [row.tolist() for out in call(0) for row in out]
    order = shapes.by_length(rows)
    return call, {"logits": {i: logits[order.index(i)] for i in check}}
