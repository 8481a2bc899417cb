"""patch(obj) for what a user holds: a model of transformers, also behind torch.compile, or an object of a system around one."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rerank_kernels import check
from rerank_kernels.backend import registry
from rerank_kernels.backend.modes import Mode, named
from rerank_kernels.errors import PatchError
from rerank_kernels.models.bound import CHANGING, Method, Methods, class_of, forward_of
from rerank_kernels.models.registry import sparse_layers
from rerank_kernels.patching import walk
from rerank_kernels.patching.report import Report
from rerank_kernels.patching.systems.resolved import Resolved, joined
from rerank_kernels.patching.systems.table import resolve

Predictor = Callable[[int, Tensor], Tensor]


def patch(
    obj: Any,
    mode: str = "portable",
    strict: bool = True,
    *,
    backend: str | None = None,
    predictor: Predictor | None = None,
    graphs: bool = True,
) -> Report:
    """Make what `obj` holds compute with rerank_kernels, in place.

    A second call in the same way does nothing; in another way it is an error. `print(report)` shows what was changed: modules,
    methods of the object, and what stays the system's own.

    obj: one of
    - a model of transformers 4.57 or 5, also behind torch.compile: BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA or
      ModernBERT, with or without ForSequenceClassification;
    - such a model with LoRA adapters, or PEFT's PeftModel around it;
    - a container of plain leaves: nn.Linear, nn.LayerNorm, activations;
    - sentence-transformers' CrossEncoder and SentenceTransformer;
    - FlagEmbedding's FlagReranker, FlagLLMReranker, FlagModel and FlagLLMModel;
    - LangChain's HuggingFaceEmbeddings and HuggingFaceCrossEncoder, LlamaIndex's HuggingFaceEmbedding and
      SentenceTransformerRerank;
    - Haystack's TransformersSimilarityRanker and SentenceTransformersSimilarityRanker, before warm_up() or after it;
    - Infinity's AsyncEngineArray, SyncEngineArray and AsyncEmbeddingEngine.

    What differs from stock:
    - Logits are float32 whatever the body's dtype. Rankings go by logit, for scores tie near 1.0.
    - Hidden states at padding are 0. A row without tokens gives the head's value for a zero vector.
    - Positions count the tokens that attention_mask keeps, so a left-padded pair gets the bits that it gets alone.
    - Forwards of modules inside the encoder do not run, and hooks on them are an error. So is every change to what is read of
      them, at the call after it, unless stock's arithmetic with the change is served too.

    mode: "portable", the same bits on every CPU and GPU; or "tensor", for float16 and bfloat16 models: products on a GPU's
    tensor cores, the same bits on one GPU architecture. It needs a GPU here, but the model may be moved there later.
    strict: raise PatchError if anything is unknown or would break the promise, and change nothing. If False, leave that as it
    is, with the encoder that holds it, and list it in the report.
    backend: the one that serves this model, "triton" for instance, whatever rk.use() and the environment say around it. If not
    given: what they say, else the device's default.

    graphs: on a GPU the model's forward is captured as CUDA graphs, which are replayed: the same bits, and less work for the
    host. What cannot be captured runs without, and report.graphs() says why. Without a GPU nothing is captured.

    predictor: for a decoder whose feed-forward layers are sparse. predictor(layer, x) is given the rows [rows, D] that layer's
    feed-forward layer reads, and returns the neurons to look at, bool [rows, F]. All others count as zero: the model computes
    another function. It keeps each promise that the predictor keeps: a row's answer must depend on that row alone.

    Raises TypeError if obj is none of these, ValueError for another mode, BackendError for a backend that is not here, and
    PatchError for all else that stands in the way.
    """
    numeric = named("patch", mode)
    check.choice("patch", "graphs", graphs, (True, False))
    with CHANGING:
        return _patch(obj, numeric, strict, backend, predictor, graphs)


def _patch(obj: Any, numeric: Mode, strict: bool, backend: str | None, predictor: Predictor | None, graphs: bool) -> Report:
    found = resolve(obj)
    if found is None:
        report = walk.prepare(obj, numeric, strict, backend=backend, graphs=graphs)
        _propose(report, predictor)
        walk.bind(report)
        return report
    if found.problems and (strict or not (found.modules or found.overrides)):
        lines = "".join(f"\n  {problem}" for problem in found.problems)
        raise PatchError(f"patch: {found.system} cannot be served; nothing was patched:{lines}")
    _as_before(found, numeric, backend, graphs)
    reports = {path: _prepared(found, path, numeric, strict, backend, graphs) for path in found.modules}
    report = _merged(found, reports, numeric, backend)
    _propose(report, predictor)
    for one in reports.values():
        walk.bind(one)
    for override in found.overrides.values():
        methods = Methods.of(override.holder)
        if override.name not in methods:  # one that copy.copy took from another is not there
            again = functools.partial(
                patch, mode=numeric.name, strict=strict, backend=backend, predictor=predictor, graphs=graphs
            )
            methods.put(Method(override.holder, override.name, override.function, numeric, strict, backend, report, again))
    return report


def _propose(report: Report, predictor: Predictor | None) -> None:
    """Give the predictor to the decoders of what is being patched."""
    decoders = {path: forward for path, forward in report.forwards.items() if sparse_layers(forward.module)}
    if predictor is not None and not callable(predictor):
        raise TypeError(f"patch: predictor must be a function of layer and rows, got {type(predictor).__name__}")
    if predictor is not None and not decoders:
        raise PatchError(
            "patch: predictor must be left out, for no decoder here has a sparse feed-forward layer; such are those whose "
            "activation is nn.ReLU, ReLUSquaredActivation or nn.Threshold"
        )
    for path, forward in decoders.items():
        if forward_of(forward.module) is forward and forward.predictor is not predictor:
            raise PatchError(
                f"patch: {path or 'the model'} ({class_of(forward.module)}) is patched already, with another predictor or "
                "none; call rk.unpatch(model) first"
            )
    for path, forward in decoders.items():
        forward.predictor = predictor
        if predictor is not None:
            report.notes.append(f"{path or 'the model'}: a predictor chooses neurons, which makes it another function")


def unpatch(obj: Any) -> None:
    """Undo patch: every module and method of `obj` gets its class's own back, and nothing else was ever changed.

    A `forward` or method that was put before ours since then (a wrapper, accelerate's prepare()) stays, and what it calls is
    the class's own from now on. Calls on their way in other threads end as patched or as stock.
    """
    with CHANGING:
        found = resolve(obj)
        if found is None:
            return walk.unpatch(obj)
        for holder in found.holders:
            methods = Methods.of(holder)
            for name in list(methods):
                methods.take_out(name)
            for name in [name for name, value in list(vars(holder).items()) if isinstance(value, Method | Methods)]:
                del vars(holder)[name]  # of a shallow copy
        for module in found.modules.values():
            walk.unpatch(module)


def _as_before(found: Resolved, mode: Mode, backend: str | None, graphs: bool) -> None:
    for path, override in found.overrides.items():
        before = vars(override.holder).get(override.name)
        if isinstance(before, Method) and (before.mode, before.backend) != (mode, backend):
            was, asked = (f"mode {m.name!r}, backend {b!r}" for m, b in ((before.mode, before.backend), (mode, backend)))
            raise PatchError(
                f"patch: {path} of {class_of(override.holder)} is patched already, in {was}, and {asked}, was asked for; "
                "call rk.unpatch() with it first"
            )
        # of a model that is still to be loaded; of one that is there, its forwards know
        had = getattr(getattr(before, "patch", None), "keywords", {}).get("graphs", graphs)
        if had != graphs and not found.modules:
            raise PatchError(
                f"patch: {path} of {class_of(override.holder)} is patched already, with graphs={had}, and graphs={graphs} was "
                "asked for; call rk.unpatch() with it first"
            )


def _prepared(found: Resolved, path: str, mode: Mode, strict: bool, backend: str | None, graphs: bool) -> Report:
    try:
        return walk.prepare(found.modules[path], mode, strict, backend=backend, graphs=graphs)
    except PatchError as error:
        raise PatchError(f"patch: {found.system}, {path}: {str(error).removeprefix('patch: ')}") from None


def _merged(found: Resolved, reports: dict[str, Report], mode: Mode, backend: str | None) -> Report:
    report = Report(mode.name, {}, {}, {}, {}, backend, found.system)
    for path, one in reports.items():
        for kind in ("replaced", "exact", "unknown", "forwards"):
            getattr(report, kind).update({joined(path, p): value for p, value in getattr(one, kind).items()})
    report.overrides |= {path: override.about for path, override in found.overrides.items()}
    report.notes += [*found.problems, *found.notes]
    if _tf32(backend):
        warnings.warn(_TF32, stacklevel=3)
        report.notes.append(_TF32)
    return report


_TF32 = (
    "allow_tf32 is set, and backend 'pytorch' computes its products on a GPU with PyTorch's, in the fewer digits that it "
    "allows; set torch.backends.cuda.matmul.allow_tf32 = False, or take backend cuda or triton, which do not read it"
)


def _tf32(backend: str | None) -> bool:
    """Whether the setting, which is everyone's in the process (infinity_emb sets it), can change a bit of ours."""
    if not torch.cuda.is_available() or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return False
    return (backend or registry.active("cuda").name) == "pytorch"
