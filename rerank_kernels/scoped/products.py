"""Products of matrices: each output is `dot` of a row and a column (NUMERICS.md), whatever form PyTorch's call has.

Where alpha, beta or a bias come in: fl(fl(alpha · dot) + fl(beta · self)) in float32, with one rounding at the end. A factor
of 1 rounds nothing. self is not read where beta is 0, as in PyTorch.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from rerank_kernels.ops.linear import bmm as own_bmm
from rerank_kernels.ops.linear import linear as own_linear
from rerank_kernels.scoped.refusal import Refusal, floats

Number = float | int


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002  PyTorch's name
    floats(input=input, weight=weight, bias=bias)
    if weight.dim() == 1:  # a vector: the result has no features
        return own_linear(input, weight[None])[..., 0] if bias is None else addmv(bias, input, weight)
    return own_linear(input, weight, bias)


def mm(self: Tensor, mat2: Tensor) -> Tensor:
    floats(self=self, mat2=mat2)
    return own_linear(self, mat2.t())


def mv(self: Tensor, vec: Tensor) -> Tensor:
    floats(self=self, vec=vec)
    return own_linear(self, vec[None])[..., 0]


def dot(self: Tensor, tensor: Tensor) -> Tensor:
    return mv(self[None], tensor)[0]


def vdot(self: Tensor, other: Tensor) -> Tensor:
    return dot(self, other)


def bmm(self: Tensor, mat2: Tensor) -> Tensor:
    floats(self=self, mat2=mat2)
    return own_bmm(self, mat2)


def addmm(self: Tensor, mat1: Tensor, mat2: Tensor, beta: Number = 1, alpha: Number = 1) -> Tensor:
    floats(self=self, mat1=mat1, mat2=mat2)
    if alpha == 1 and beta == 1 and self.dim() == 1 and self.shape[0] == mat2.shape[1]:
        return own_linear(mat1, mat2.t(), self)
    return _scaled(self, own_linear(mat1, mat2.t(), out_dtype=torch.float32), beta, alpha, mat1.dtype)


def addmv(self: Tensor, mat: Tensor, vec: Tensor, beta: Number = 1, alpha: Number = 1) -> Tensor:
    floats(self=self, mat=mat, vec=vec)
    return _scaled(self, own_linear(mat, vec[None], out_dtype=torch.float32)[..., 0], beta, alpha, mat.dtype)


def baddbmm(self: Tensor, batch1: Tensor, batch2: Tensor, beta: Number = 1, alpha: Number = 1) -> Tensor:
    floats(self=self, batch1=batch1, batch2=batch2)
    return _scaled(self, own_bmm(batch1, batch2, out_dtype=torch.float32), beta, alpha, batch1.dtype)


def addbmm(self: Tensor, batch1: Tensor, batch2: Tensor, beta: Number = 1, alpha: Number = 1) -> Tensor:
    """The sum over the batch is more terms of the same `dot`."""
    return addmm(self, batch1.transpose(0, 1).flatten(1), batch2.flatten(0, 1), beta, alpha)


def grouped_mm(
    self: Tensor,
    mat2: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows of self by the matrix of their group, as experts have them; offs says where each group ends."""
    floats(self=self, mat2=mat2)
    if bias is not None or mat2.dim() != 3 or (self.dim() == 2) != (offs is not None):
        raise Refusal("served are rows [M, K] with offs and entries [G, M, K], both by [G, K, N], without bias")
    if offs is None:
        return own_bmm(self, mat2, out_dtype=out_dtype)
    y = self.new_zeros(self.shape[0], mat2.shape[2], dtype=out_dtype or self.dtype)
    for group, (start, stop) in enumerate(itertools.pairwise([0, *offs.tolist()])):
        y[start:stop] = own_linear(self[start:stop], mat2[group].t(), out_dtype=out_dtype)
    return y


def _scaled(added: Tensor, product: Tensor, beta: Number, alpha: Number, dtype: torch.dtype) -> Tensor:
    if alpha != 1:
        product = product * alpha
    if beta != 0:
        product = product + (added.float() if beta == 1 else added.float() * beta)
    return product.to(dtype)


ROUTES = {
    "linear": linear,
    "mm": mm,
    "mv": mv,
    "dot": dot,
    "vdot": vdot,
    "bmm": bmm,
    "addmm": addmm,
    "addmv": addmv,
    "baddbmm": baddbmm,
    "addbmm": addbmm,
    "_grouped_mm": grouped_mm,
}
