"""rerank_kernels: the score of a query-document pair is the same bits whatever the batch, padding, threads or run."""

from rerank_kernels.backend import BackendError, backends, use
from rerank_kernels.binding import PatchError
from rerank_kernels.hf import Report
from rerank_kernels.integrations import patch, unpatch
from rerank_kernels.native.layout import forget
from rerank_kernels.ops.attention import attention
from rerank_kernels.ops.linear import activation, bmm, linear
from rerank_kernels.ops.norm import layer_norm, normalize
from rerank_kernels.ops.pooling import HeadOutput, pool, score_head, sigmoid
from rerank_kernels.ops.softmax import mean, softmax, sum  # noqa: A004  torch's name
from rerank_kernels.ops.sparse_ffn import sparse_ffn
from rerank_kernels.reranker import Ranked, Reranker, Scores

__version__ = "0.1.0"
NUMERICS_VERSION = 1

__all__ = [
    "NUMERICS_VERSION",
    "BackendError",
    "HeadOutput",
    "PatchError",
    "Ranked",
    "Report",
    "Reranker",
    "Scores",
    "activation",
    "attention",
    "backends",
    "bmm",
    "forget",
    "layer_norm",
    "linear",
    "mean",
    "normalize",
    "patch",
    "pool",
    "score_head",
    "sigmoid",
    "softmax",
    "sparse_ffn",
    "sum",
    "unpatch",
    "use",
]
