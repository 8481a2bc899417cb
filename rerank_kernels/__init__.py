"""rerank_kernels: the score of a query-document pair is the same bits whatever the batch, padding, threads or run.

A public name loads its module, and with it torch, when it is first asked for: `rerank-kernels --help` does without.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from rerank_kernels.names import OPS
from rerank_kernels.version import NUMERICS_VERSION
from rerank_kernels.version import __version__ as __version__

if TYPE_CHECKING:  # for type checkers and editors; _NAMES says the same to Python
    from rerank_kernels.backend.registry import backends, use
    from rerank_kernels.backend.weights import forget
    from rerank_kernels.errors import BackendError, FallbackWarning, InvariantError, InvariantWarning, PatchError
    from rerank_kernels.models.prefix import Prefix, prefix
    from rerank_kernels.models.sampling import Sampling
    from rerank_kernels.ops.attention import *  # noqa: F403  an op's name stands in names.py alone
    from rerank_kernels.ops.linear import *  # noqa: F403
    from rerank_kernels.ops.norm import *  # noqa: F403
    from rerank_kernels.ops.pooling import *  # noqa: F403
    from rerank_kernels.ops.pooling import HeadOutput
    from rerank_kernels.ops.rotary import *  # noqa: F403
    from rerank_kernels.ops.rotary import rotary_table
    from rerank_kernels.ops.sequences import Sequences
    from rerank_kernels.ops.softmax import *  # noqa: F403
    from rerank_kernels.ops.sparse_ffn import *  # noqa: F403
    from rerank_kernels.patching.patch import patch, unpatch
    from rerank_kernels.patching.report import Report
    from rerank_kernels.scoped.report import InvariantReport
    from rerank_kernels.scoped.scope import invariant
    from rerank_kernels.scoring.reranker import Ranked, Reranker, Scores
    from rerank_kernels.scoring.templates import Template

__all__ = [
    "NUMERICS_VERSION",
    "BackendError",
    "FallbackWarning",
    "HeadOutput",
    "InvariantError",
    "InvariantReport",
    "InvariantWarning",
    "PatchError",
    "Prefix",
    "Ranked",
    "Report",
    "Reranker",
    "Sampling",
    "Scores",
    "Sequences",
    "Template",
    "backends",
    "forget",
    "invariant",
    "patch",
    "prefix",
    "rotary_table",
    "unpatch",
    "use",
    *OPS,
]

_NAMES = {
    "backend.registry": ("backends", "use"),
    "backend.weights": ("forget",),
    "errors": ("BackendError", "FallbackWarning", "InvariantError", "InvariantWarning", "PatchError"),
    "models.prefix": ("Prefix", "prefix"),
    "models.sampling": ("Sampling",),
    "ops.pooling": ("HeadOutput",),
    "ops.rotary": ("rotary_table",),
    "ops.sequences": ("Sequences",),
    "patching.patch": ("patch", "unpatch"),
    "patching.report": ("Report",),
    "scoped.report": ("InvariantReport",),
    "scoped.scope": ("invariant",),
    "scoring.reranker": ("Ranked", "Reranker", "Scores"),
    "scoring.templates": ("Template",),
}
_HOME = {name: home for home, names in _NAMES.items() for name in names} | {op: f"ops.{OPS[op]}" for op in OPS}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _ready_for_saved_graphs() -> None:
    """Makes the ops that a graph saved by torch.jit or torch.export calls: importing this package is enough to load one."""
    for home in {*(home for home in _HOME.values() if home.startswith("ops.")), "models.packing", "models.decoder"}:
        importlib.import_module(f"{__name__}.{home}")
    importlib.import_module(f"{__name__}.ops.opaque").register_all()


class _WhenTorchIsImported:
    """On sys.meta_path until torch is imported: this package does not import it, and its graphs have to be ready by then."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torch":
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None or not hasattr(spec.loader, "exec_module"):
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            with contextlib.suppress(Exception):  # a torch that does not fit must not fail here: our first use says why
                _ready_for_saved_graphs()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if hasattr(sys.modules.get("torch"), "library"):
    _ready_for_saved_graphs()
else:
    sys.meta_path.insert(0, _WhenTorchIsImported)
