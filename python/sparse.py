"""A small Llama with ReLU, trained here on real text until few of its neurons are active; then run sparse.

What it shows: the share of active neurons per layer; the time of a token, sparse and as stock computes it, dense; and 20 runs
of 8 prompts, with one thread and with two, alone and batched. Each run of ours has one hash. Beside it stands the sparse layer
as it is usually written: active neurons are added in the order in which threads happen to finish. Its hashes differ.

The text is what Python's own library says of its functions. Nothing is downloaded. Exits with 1 if ours differ.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import inspect
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from prove import set_threads  # beside this file, as rerank.py is
from rerank import console, docstrings
from rich.progress import Progress
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import rerank_kernels as rk

WIDTH, NEURONS, LAYERS, HEADS = 192, 3072, 3, 3
TOKENS, ROWS = 64, 8  # of a batch of the training
BYTES, BEGIN = 256, 256  # a token is a byte, or the beginning of a text
L1 = 1e-4  # what activations cost in training: so most neurons learn to be off
PROMPTS = ("Return the ", "Create a new ", "If the file ", "A list of ", "Raise ", "Split the ", "Convert a ", "The number of ")
WORDS = 16  # bytes of an answer
THREADS, BATCHES = (1, 2), (1, 8)
# the argument that transformers 5 calls by another name
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"

Model = Any  # a LlamaForCausalLM, whose attributes torch does not type


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="of the training (default 300, about a minute)")
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="of the same prompts (default 20)")
    parser.add_argument("--quick", action="store_true", help="a tenth of both: it only shows that all of it runs")
    asked = parser.parse_args()
    steps, runs = (asked.steps // 10, max(2, asked.runs // 10)) if asked.quick else (asked.steps, asked.runs)
    text = "\n".join(docstrings())
    model, loss = trained(text, steps)
    out = console()
    out.print(f"{steps} steps on {len(text):,} bytes of docstrings: {loss / 0.6931:.2f} bits per byte\n")
    patched = copy.deepcopy(model)
    rk.patch(patched)
    dense, sparse = seconds(model, patched)
    model.bfloat16()
    with as_usual(model):
        usual = answers(model, runs)
    report = rk.patch(model)
    ours = answers(model, runs)

    table = Table(title="active neurons", title_justify="left")
    table.add_column("layer")
    table.add_column("share", justify="right")
    for path, share in report.active().items():
        table.add_row(path, f"{share:.1%}")
    out.print(table)
    table = Table(title=f"float32, a token behind {TOKENS} others, {torch.get_num_threads()} threads", title_justify="left")
    for name in ("", "milliseconds", "of stock's speed"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("stock, dense", f"{dense * 1e3:.2f}", "1.00")
    table.add_row("rerank_kernels, sparse", f"{sparse * 1e3:.2f}", f"{dense / sparse:.2f}")
    out.print(table)
    made = runs * len(THREADS) * len(BATCHES)
    table = Table(title=f"bfloat16, {len(PROMPTS)} prompts answered {made} times: {runs} runs x {len(THREADS)} thread counts x "
                  f"batches of {' and '.join(map(str, BATCHES))}", title_justify="left")  # fmt: skip
    for name in ("", "different texts", "different hashes of the logits"):
        table.add_column(name, justify="right" if name else "left")
    for name, found in (("neurons added in the order of arrival", usual), ("rerank_kernels", ours)):
        table.add_row(name, str(len({words for words, _ in found})), str(len({bits for _, bits in found})))
    out.print(table)
    out.print("rerank_kernels answers:")
    for prompt, words in zip(PROMPTS, ours[0][0], strict=True):
        out.print(f"  {prompt}{words}", markup=False)
    return 0 if len(set(ours)) == 1 else 1


# ---- training ---------------------------------------------------------------------------------------------------------------


def small_model() -> Model:
    sizes = dict(hidden_size=WIDTH, intermediate_size=NEURONS, num_hidden_layers=LAYERS, num_attention_heads=HEADS)
    ends = dict(vocab_size=BYTES + 1, bos_token_id=BEGIN, eos_token_id=None, pad_token_id=0)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, **ends, hidden_act="relu", max_position_embeddings=256))


def trained(text: str, steps: int) -> tuple[Model, float]:
    """The model, in eval mode, and the mean loss of the last steps, in nats per byte."""
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    model, draw, losses = small_model(), torch.Generator().manual_seed(0), []
    active: list[torch.Tensor] = []
    hooks = [layer.mlp.act_fn.register_forward_hook(lambda m, x, y: active.append(y.mean())) for layer in model.model.layers]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=max(steps, 2))
    with progress() as bar:
        for _ in bar.track(range(steps), description="training"):
            starts = torch.randint(len(data) - TOKENS, (ROWS,), generator=draw)
            ids = torch.stack([data[s : s + TOKENS] for s in starts.tolist()])
            logits = model(input_ids=F.pad(ids[:, :-1], (1, 0), value=BEGIN), use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
            (loss + L1 * sum(active) * NEURONS / LAYERS).backward()
            active.clear()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
    for hook in hooks:
        hook.remove()
    last = losses[-max(1, len(losses) // 10) :]
    return model.eval().requires_grad_(False), sum(last) / len(last)


def progress() -> Progress:
    return Progress(console=console(), transient=True, disable=not sys.stdout.isatty())


# ---- what is compared --------------------------------------------------------------------------------------------------------


def seconds(*models: Model, times: int = 100) -> list[float]:
    """The time of one token behind a cache, of each model in turn: the least, for what else runs can only add to it."""
    ids, taken = torch.arange(TOKENS)[None] % BYTES, []
    with torch.inference_mode():
        caches = [model(input_ids=ids, use_cache=True)[CACHE] for model in models]
        for _ in range(times):
            for model, cache in zip(models, caches, strict=True):
                start = time.perf_counter()
                model(input_ids=ids[:, -1:], **{CACHE: cache})
                taken.append(time.perf_counter() - start)
                cache.crop(-1)
    return [min(taken[i :: len(models)]) for i in range(len(models))]


def answers(model: Model, runs: int) -> list[tuple[tuple[str, ...], str]]:
    """The answers to all prompts and the hash of all logits that led to them, of each run, thread count and batch."""
    found = []
    with progress() as bar, torch.inference_mode():
        for _ in bar.track(range(runs), description="answering"):
            for threads in THREADS:
                with set_threads(threads):
                    for size in BATCHES:
                        parts = [answered(model, PROMPTS[i : i + size]) for i in range(0, len(PROMPTS), size)]
                        words = tuple(one for texts, _ in parts for one in texts)
                        logits = torch.cat([logits for _, logits in parts])
                        found.append((words, hashlib.sha256(logits.numpy().tobytes()).hexdigest()))
    return found


def answered(model: Model, prompts: tuple[str, ...]) -> tuple[list[str], torch.Tensor]:
    """Greedy, padded on the left; the texts and the logits [prompts, WORDS, vocabulary]."""
    ids = [[BEGIN, *p.encode()] for p in prompts]
    width = max(map(len, ids))
    new = torch.tensor([[0] * (width - len(i)) + i for i in ids])
    mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids])
    cache, words, steps = DynamicCache(), [], []
    for _ in range(WORDS):
        out = model(input_ids=new, attention_mask=mask, logits_to_keep=1, **{CACHE: cache})
        steps.append(out.logits[:, -1].float())
        new = steps[-1][:, :BYTES].argmax(-1, keepdim=True)
        mask = F.pad(mask, (0, 1), value=1)
        words.append(new)
    return [bytes(row.tolist()).decode(errors="replace") for row in torch.cat(words, 1)], torch.stack(steps, 1)


@contextmanager
def as_usual(model: Model) -> Iterator[None]:
    """Inside the block each mlp adds its active neurons as a parallel axpy with atomic additions does: in the order in which
    threads get there. That order is drawn here, so that each machine shows the same."""
    turns = torch.Generator().manual_seed(0)

    def forward(mlp: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(mlp.gate_proj(x)) * mlp.up_proj(x)
        rows, down, y = hidden.flatten(0, -2), mlp.down_proj.weight.t(), torch.zeros(*x.shape).flatten(0, -2)
        for row, total in zip(rows, y, strict=True):
            some = row.nonzero()[:, 0]
            for part in some[torch.randperm(len(some), generator=turns)].split(max(1, len(some) // 4)):
                total += row[part] @ down[part]  # rounded to x's dtype, as a half-precision accumulator is
        return y.view(x.shape).to(x.dtype)

    for layer in model.model.layers:
        layer.mlp.forward = forward.__get__(layer.mlp)
    yield
    for layer in model.model.layers:
        del layer.mlp.forward


if __name__ == "__main__":
    sys.exit(main())
