"""Options that several commands have."""

from __future__ import annotations

import argparse

MODELS = "a local model folder, a decoder's GGUF file, or shape:NAME: random weights, bge-reranker-base for instance"


def model_options(sub: argparse.ArgumentParser, what: str = "a local model folder, as save_pretrained writes it") -> None:
    sub.add_argument("model", metavar="MODEL", help=what)
    sub.add_argument(
        "--max-length", type=positive, metavar="N", help="cut each text to N tokens (default: what the model takes)"
    )
    sub.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run code that lies in the model's folder, where a model or tokenizer needs it; read it first (default: never)",
    )
    sub.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="type of the weights (default: as stored)")
    sub.add_argument("--device", metavar="D", help="where the model goes, cuda for instance (default: cpu)")
    sub.add_argument(
        "--mode",
        choices=("portable", "tensor"),
        default="portable",
        help="portable: the same bits on every CPU and GPU (default); tensor: a GPU's tensor cores, the same bits on one "
        "GPU architecture, for fp16 and bf16",
    )


def template_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--template",
        metavar="NAME",
        help="of an LLM reranker that answers yes or no: qwen3-reranker, qwen3-reranker-evaluation, bge-reranker-v2-gemma or "
        "mxbai-rerank-v2 (default: that of the model's type)",
    )
    sub.add_argument("--instruction", metavar="TEXT", help="in the template's place for one (default: the template's own)")


def graph_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--no-graphs", action="store_true", help="on a GPU: no CUDA graphs, which cost memory and change no bit")


def positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return number
