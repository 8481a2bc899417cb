"""Engines on the same model and pairs as ours, each in a process of its own with the run's threads.

The model is exported once a run (torch.onnx, dynamic batch and length), with the very weights that ours has. "plain" has
attention written out: of that OpenVINO made a model 5 to 10 % faster than of SDPA's graph, ONNX Runtime one as fast. "fused" is
ONNX Runtime at its best: its transformer optimiser (model type bert) finds layer norms and GELU in what is exported but, in
transformers 5's graph, no attention, with either implementation; so attention goes into the export as the one node that the
optimiser would make of it, MultiHeadAttention with a key mask. OpenVINO is held to float32.

Before an engine is timed some of its logits are compared with float64's (cases/models.py). An engine that is not installed has
a row that says so.
"""

from __future__ import annotations

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
from bench.harness import worker
from bench.harness.turns import Missing

ENGINES = {  # name -> how the model is exported, and the package
    "ONNX Runtime": ("plain", "onnxruntime"),
    "ONNX Runtime, fused": ("fused", "onnxruntime"),
    "OpenVINO": ("plain", "openvino"),
}
NEEDED = ("onnx", "onnxscript")  # by the export, besides the engine
INSTALL = "pip install -e '.[engines]'"
Run = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Question:
    """A case: the pairs, how many go into a batch, and those whose logits are wanted for a check."""

    shape: shapes.Shape
    lengths: tuple[int, ...]
    size: int
    check: tuple[int, ...]


_exported: dict[str, tuple[shapes.Shape, tempfile.TemporaryDirectory[str]]] = {}  # how -> the model in that folder


def missing(engine: str) -> str | None:
    lacking = [p for p in (ENGINES[engine][1], *NEEDED) if importlib.util.find_spec(p) is None]
    return f"not installed: {', '.join(lacking)} ({INSTALL})" if lacking else None


def ready(engine: str, asked: Question, right: Callable[[Mapping[int, Tensor]], None]) -> Callable[[int], float]:
    """`right` is given some pairs' logits and raises AssertionError if they are wrong."""
    if why := missing(engine):
        raise Missing(why)
    file = _export(asked.shape, ENGINES[engine][0])
    there = worker.rival(engine)
    logits = there.ask(prepare, engine, file, torch.get_num_threads(), asked)
    right({i: torch.tensor(logit) for i, logit in logits.items()})
    return there.turn


def _export(shape: shapes.Shape, how: str) -> str:
    """In a process of its own: tracing takes memory, and changes what transformers knows of attention."""
    if how not in _exported or _exported[how][0] != shape:
        folder = tempfile.TemporaryDirectory()
        worker.once(export, shape, how, folder.name)
        _exported[how] = (shape, folder)
    return f"{_exported[how][1].name}/model.onnx"


def close() -> None:
    while _exported:
        _exported.popitem()[1][1].cleanup()


class _Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def export(of: shapes.Shape, how: str, folder: str) -> None:
    fused = how == "fused"
    model: Any = shapes.reranker(of)
    if fused:
        _attention_as_one_node(model)
    else:
        model.set_attn_implementation("eager")
    batch = shapes.padded(of, shapes.tokens(of, (9, 17, 12)))
    sizes = {0: torch.export.Dim("batch", min=1, max=4096), 1: torch.export.Dim("length", min=2, max=512)}
    file = f"{folder}/{'traced' if fused else 'model'}.onnx"
    torch.onnx.export(
        _Logits(model).eval(),  # else the export leaves dropout in
        tuple(batch.values()),
        file,
        dynamo=True,
        dynamic_shapes=dict.fromkeys(batch, sizes),
        input_names=list(batch),
        output_names=["logits"],
        external_data=True,
        verbose=False,
    )
    if fused:
        from onnxruntime.transformers import optimizer
        from onnxruntime.transformers.fusion_options import FusionOptions

        options = {"model_type": "bert", "opt_level": 0, "optimization_options": FusionOptions("bert")}
        better = optimizer.optimize_model(file, num_heads=of.heads, hidden_size=of.hidden, **options)
        better.save_model_to_file(f"{folder}/model.onnx", use_external_data_format=True)
        for part in pathlib.Path(folder).glob("traced.onnx*"):
            part.unlink()


def _attention_as_one_node(model: Any) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **_: Any) -> tuple[Tensor, None]:
        b, heads, t, d = q.shape
        flat = [z.transpose(1, 2).reshape(b, t, heads * d) for z in (q, k, v)]
        how = {"attrs": {"num_heads": heads}, "dtype": torch.float32, "shape": (b, t, heads * d), "version": 1}
        out = torch.onnx.ops.symbolic("com.microsoft::MultiHeadAttention", (*flat, None, mask), **how)  # type: ignore[arg-type]
        return out.view(b, t, heads, d), None

    def keys(*_: Any, attention_mask: Tensor, **__: Any) -> Tensor:
        return attention_mask.to(torch.int32)

    AttentionInterface.register("onnx_node", attention)
    AttentionMaskInterface.register("onnx_node", keys)
    model.set_attn_implementation("onnx_node")


def _onnxruntime(file: str, threads: int) -> Run:
    import onnxruntime

    # By default all graph optimisations are on, and threads spin between nodes. Alone in its process, told to sleep instead
    # (session.intra_op.allow_spinning), it took a sixth longer for one pair and as long for batches.
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)[0]


def _openvino(file: str, threads: int) -> Run:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(file, "CPU", settings)
    return lambda inputs: compiled(inputs)[0]


@functools.lru_cache(1)
def _loaded(engine: str, file: str, threads: int) -> Run:
    return (_openvino if engine == "OpenVINO" else _onnxruntime)(file, threads)


def prepare(engine: str, file: str, threads: int, asked: Question) -> tuple[worker.Calls, dict[int, list[float]]]:
    run, rows = _loaded(engine, file, threads), shapes.tokens(asked.shape, asked.lengths)
    made = [{n: t.numpy() for n, t in batch.items()} for batch in shapes.batches(asked.shape, rows, asked.size)]

    def call(i: int) -> list[Any]:
        return [run(batch) for batch in made]

    logits = [row.tolist() for out in call(0) for row in out]
    order = shapes.by_length(rows)
    return call, {i: logits[order.index(i)] for i in asked.check}
