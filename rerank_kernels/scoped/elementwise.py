"""Functions of single elements, where PyTorch's vector code and the code for what is left behind it differ.

On a CPU an element's bits then depend on where it stands, and on how threads share the tensor out. Some have an op of ours. The
others are PyTorch's, called in pieces: fresh memory, a whole number of vectors, fewer elements than threads share. So each
element goes through the vector code. A GPU has one code for all elements, and its calls stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rerank_kernels.check import FLOATS
from rerank_kernels.ops.linear import activation
from rerank_kernels.scoped.exact import names
from rerank_kernels.scoped.refusal import Refusal, floats, whole

PIECE = 16384  # elements; PyTorch's threads share a tensor from 32768 on
VECTOR = 64  # elements; two vectors of AVX-512 in half precision, which is the most that one step of a loop takes

# PyTorch's functions of single elements that are called in pieces, with all their overloads.
IN_PIECES = names(
    """
    acos acosh asin asinh atan atan2 atanh celu clamp clamp_max clamp_min cos cosh elu erf erfc erfinv exp exp2 expm1
    floor_divide fmax fmin fmod hardsigmoid hardswish hardtanh hypot lgamma log log10 log1p log2 log_sigmoid_forward
    logaddexp logaddexp2 logit maximum minimum pow relu6 remainder selu sin sinc sinh softplus special_erfcx special_i0e
    special_log_ndtr special_ndtri tan threshold xlogy
    """
)


def in_pieces(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """function(*args, **kwargs), a function of single elements whose tensors stand in args, in pieces."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    if any(t.device.type != "cpu" for t in tensors):
        return function(*args, **kwargs)
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    count = math.prod(shape)
    spread = any(t.dim() for t in tensors)  # beside a tensor with dimensions, one without is a number, and promotes like one
    flat = [_flat(a, shape) if isinstance(a, Tensor) and (a.dim() or not spread) else a for a in args]
    made: list[Any] = []
    for start in range(0, count, PIECE):
        stop = min(start + PIECE, count)
        short = -(stop - start) % VECTOR
        part = [_piece(a, start, stop, short) if isinstance(a, Tensor) and a.dim() else a for a in flat]
        y = function(*part, **kwargs)
        made.append(tuple(t[: stop - start] for t in y) if isinstance(y, tuple) else y[: stop - start])
    if isinstance(made[0], tuple):
        return tuple(torch.cat(parts).view(shape) if parts[0].numel() else parts[0] for parts in zip(*made, strict=True))
    return (torch.cat(made) if len(made) > 1 else made[0]).view(shape)


def _flat(t: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    return t.expand(shape).reshape(-1)


def _piece(t: Tensor, start: int, stop: int, short: int) -> Tensor:
    part = t[start:stop]
    return torch.cat([part, part.new_ones(short)]) if short else part.clone()


def exp(x: Tensor) -> Tensor:
    return in_pieces(torch.exp, (x,), {})


def log(x: Tensor) -> Tensor:
    return in_pieces(torch.log, (x,), {})


def gelu(self: Tensor, approximate: str = "none") -> Tensor:
    floats(self=self)
    return activation(self, "gelu" if approximate == "none" else "gelu_tanh")


def silu(self: Tensor) -> Tensor:
    floats(self=self)
    return activation(self, "silu")


def glu(self: Tensor, dim: int = -1) -> Tensor:
    """a · σ(b), rounded once."""
    floats(self=self)
    a, b = self.chunk(2, dim)
    return (a.float() * activation(b.float(), "sigmoid")).to(self.dtype)


def mish(self: Tensor) -> Tensor:
    floats(self=self)
    return activation(self, "mish")


def relu(self: Tensor) -> Tensor:
    """x < 0 gives +0, else x; PyTorch's vector code and the code behind it need not agree on the sign of a zero."""
    return torch.where(self < 0, torch.zeros_like(self), self) if self.dtype not in FLOATS else activation(self, "relu")


def tanh(self: Tensor) -> Tensor:
    return _activation("tanh", torch.tanh, self)


def sigmoid(self: Tensor) -> Tensor:
    return _activation("sigmoid", torch.sigmoid, self)


def root(x: Tensor) -> Tensor:
    """√x in float32, correctly rounded: PyTorch's own is MKL's in contiguous memory, which rounds otherwise on some paths. Any
    root in float64 within 3 ulp rounds to the right float32."""
    return x.double().sqrt().float()


def sqrt(self: Tensor) -> Tensor:
    if self.dtype == torch.float64 or whole(self.dtype):
        return in_pieces(torch.sqrt, (self,), {})
    floats(self=self)
    return root(self).to(self.dtype)


def rsqrt(self: Tensor) -> Tensor:
    """1 / √x, two steps, each rounded; half precision is float32 inside."""
    if self.dtype == torch.float64 or whole(self.dtype):
        return 1.0 / sqrt(self)
    floats(self=self)
    return (1.0 / root(self)).to(self.dtype)


def pow_(self: Tensor, exponent: float) -> Tensor:
    """The square is one product."""
    return self * self if exponent == 2 else in_pieces(torch.pow, (self, exponent), {})


def _activation(kind: str, stock: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.to(torch.get_default_dtype()) if whole(x.dtype) else x
    return in_pieces(stock, (x,), {}) if x.dtype == torch.float64 else activation(x, kind)


def add(self: Tensor, other: Any, alpha: float = 1) -> Tensor:
    """self + alpha · other: PyTorch's vector code has one rounding there, the rest of its code two."""
    return _added(self, other, alpha)


def sub(self: Tensor, other: Any, alpha: float = 1) -> Tensor:
    return _added(self, other, -alpha)


def rsub(self: Tensor, other: Any, alpha: float = 1) -> Tensor:
    if alpha == 1:
        return other - self
    return _added(other if isinstance(other, Tensor) else torch.full_like(self, other), self, -alpha)


def _added(x: Tensor, other: Any, alpha: float) -> Tensor:
    dtype = torch.result_type(x, other)
    if alpha == 1 or whole(dtype) or dtype == torch.bool:
        return torch.add(x, other, alpha=alpha)
    if alpha == -1:
        return torch.sub(x, other)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise Refusal(f"alpha is {alpha} and the result is {dtype}")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scaled = (other.to(wide) if isinstance(other, Tensor) else other) * alpha
    return (x.to(wide) + scaled).to(dtype)


def addcmul(self: Tensor, tensor1: Tensor, tensor2: Tensor, value: float = 1) -> Tensor:
    """self + (value · tensor1) · tensor2, each step rounded."""
    floats(self=self, tensor1=tensor1, tensor2=tensor2)
    return (self.float() + tensor1.float() * value * tensor2.float()).to(self.dtype)


def addcdiv(self: Tensor, tensor1: Tensor, tensor2: Tensor, value: float = 1) -> Tensor:
    floats(self=self, tensor1=tensor1, tensor2=tensor2)
    return (self.float() + tensor1.float() * value / tensor2.float()).to(self.dtype)


ROUTES: dict[str, Callable[..., Any]] = {
    "gelu": gelu,
    "silu": silu,
    "mish": mish,
    "glu": glu,
    "relu": relu,
    "rsqrt": rsqrt,
    "sqrt": sqrt,
    "pow.Tensor_Scalar": pow_,
    "tanh": tanh,
    "sigmoid": sigmoid,
    "add.Tensor": add,
    "add.Scalar": add,
    "sub.Tensor": sub,
    "sub.Scalar": sub,
    "rsub.Tensor": rsub,
    "rsub.Scalar": rsub,
    "addcmul": addcmul,
    "addcdiv": addcdiv,
}
