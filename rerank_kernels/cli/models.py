"""The model that the options name."""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from rerank_kernels.cli import interrupt, terminal
from rerank_kernels.cli.errors import InputError, fail_with, say
from rerank_kernels.cli.records import Record


def reranker(args: argparse.Namespace) -> Any:
    with interrupt.loading(args.ours):
        from rerank_kernels.errors import PatchError
        from rerank_kernels.scoring.reranker import Reranker

        quiet()
        try:
            with terminal.without_panics():
                return Reranker(
                    args.model,
                    max_length=args.max_length,
                    dtype=dtype(args.dtype),
                    device=device(args.device),
                    mode=args.mode,
                    graphs=not args.no_graphs,
                    template=args.template,
                    instruction=args.instruction,
                    trust_remote_code=args.trust_remote_code,
                )
        except (ValueError, PatchError) as error:
            fail_with(error)


def loaded(args: argparse.Namespace) -> Any:
    """verify.load's: the model, not patched, where it is to be, with its tokenizer."""
    with interrupt.loading(args.ours):
        from rerank_kernels.verify import load

        quiet()
        with terminal.without_panics():
            found = load(args.model, dtype(args.dtype), args.trust_remote_code)
        if (where := device(args.device)) is not None:
            found.model.to(where)
        if found.note:
            say(found.note)
        return found


@contextlib.contextmanager
def scoring(records: Sequence[Record]) -> Iterator[None]:
    """A text that is too long is said with its record's place, and what cannot be scored is one line; other warnings stay what
    they are."""
    from rerank_kernels.scoring.bounding import BoundedWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BoundedWarning)
        try:
            yield
        except ValueError as error:  # what the folder's tokenizer makes of these texts
            fail_with(error)
    for one in caught:
        if isinstance(one.message, BoundedWarning):
            text = one.message.text
            where = next((r.where for r in records if text in (r.query, r.document)), "--query")
            say(f"warning: {where}: {str(one.message).partition(': ')[2]}")
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def say_not_finite(count: int, total: int) -> None:
    """NaN and infinity are no numbers of JSON."""
    if count:
        say(f"warning: {count:,} of {total:,} logits are not finite; they are null, or empty in a table")


def dtype(name: str | None) -> Any:
    import torch

    return {None: None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


def device(name: str | None) -> Any:
    """A device that this machine has, None as it is."""
    import torch

    if name is None:
        return None
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # torch's own for a name, a missing driver, a CPU-only build
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return found


def quiet() -> None:
    """transformers' own bars and load reports, and what Rust prints of a panic, would stand between the lines of our output."""
    from transformers.utils import logging as transformers_logging

    from rerank_kernels.scoring import tokenising

    tokenising.around = terminal.without_panics
    logging: Any = transformers_logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
