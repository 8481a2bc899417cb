"""The errors and warnings that a user may want to catch, in one place below all that raises them."""

from __future__ import annotations


class BackendError(RuntimeError):
    """No backend can serve the op on the device, or the one asked for is not there; the message says who can and why not."""


class FallbackWarning(RuntimeWarning):
    """Something slower serves, and this is said once per process. The C++ library is missing, so the pytorch backend does, with
    other bits; or the kernels for Hopper failed their trial, so those for every GPU do, with the bits of the contract.
    """


class PatchError(RuntimeError):
    """The model cannot be served as asked; the message says which modules, and what would work. Nothing was changed."""


class InvariantError(RuntimeError):
    """Inside rk.invariant: an op that would break its promise; the message says which, where, why, and what would work."""


class InvariantWarning(RuntimeWarning):
    """Inside rk.invariant(strict=False): PyTorch computed an op that breaks the promise. Given once per op and block."""
