"""Model folders as save_pretrained and sentence-transformers write them: what is in them, loaded, or an error that names it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rerank_kernels import check
from rerank_kernels.ops.pooling import POOL_MODES

KINDS = ("cross-encoder", "embedding")


def kind_of(architectures: list[str]) -> str:
    return KINDS[0] if any(name.endswith("ForSequenceClassification") for name in architectures) else KINDS[1]


def read_json(folder: Path, name: str) -> Any:
    if not folder.is_dir():
        raise ValueError(
            f"Reranker: model_or_path must be a local model folder, got {str(folder)!r}, which is none; nothing is downloaded "
            "here: fetch a model with huggingface_hub.snapshot_download(...) and pass the folder it returns"
        )
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"Reranker: {folder} must be a model folder with a readable {name}; {error}") from error


def load_model(folder: Path, kind: str) -> Any:
    from transformers import AutoModel, AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification if kind == "cross-encoder" else AutoModel
    try:
        with _no_bar():
            model, info = auto.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except Exception as error:  # the loaders raise whatever their file readers raise
        raise ValueError(f"Reranker: no model could be loaded from {folder}: {error}") from error
    # transformers fills missing weights with random numbers and goes on; the pooler is not read for embeddings
    missing = sorted(k for k in info["missing_keys"] if kind == "cross-encoder" or not k.startswith("pooler."))
    if missing:
        raise ValueError(
            f"Reranker: the weights in {folder} must hold every parameter of a {kind}; {len(missing)} are missing: "
            + ", ".join(missing[:4])
        )
    return model


@contextmanager
def _no_bar() -> Iterator[None]:
    """Without transformers' progress bar, which a local file needs for a second; the user's setting comes back afterwards."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"Reranker: no tokenizer could be loaded from {folder}: {error}") from error
    # without its files transformers 5 makes an empty tokenizer, for which all texts are alike
    names = sorted({"tokenizer.json", *tokenizer.vocab_files_names.values()})
    if not any((folder / name).exists() for name in names):
        raise ValueError(f"Reranker: no tokenizer could be loaded from {folder}: it holds none of {', '.join(names)}")
    return tokenizer


def pooling_of(folder: Path) -> tuple[str, bool, int | None]:
    """(pooling, normalise, max tokens) as sentence-transformers' files say; the mean of length 1 if there are none."""
    if not (folder / "modules.json").exists():
        return "mean", True, None
    modules = {str(m["type"]).rsplit(".", 1)[-1]: folder / m.get("path", "") for m in read_json(folder, "modules.json")}
    if extra := sorted(set(modules) - {"Transformer", "Pooling", "Normalize"}):
        check.fail("Reranker", "modules.json", "Transformer, Pooling and perhaps Normalize", ", ".join(extra))
    pooling = "mean"
    if "Pooling" in modules:
        config = read_json(modules["Pooling"], "config.json")
        modes = config.get("pooling_mode") or [
            key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
            for key, on in config.items()
            if key.startswith("pooling_mode_") and on is True
        ]
        modes = [modes] if isinstance(modes, str) else list(modes)
        if len(modes) != 1 or modes[0] not in POOL_MODES:
            check.fail(
                "Reranker", f"{modules['Pooling'].name}'s pooling mode", " or ".join(POOL_MODES), " + ".join(modes) or "none"
            )
        pooling = modes[0]
    prompts = folder / "config_sentence_transformers.json"
    if prompts.exists() and (name := read_json(folder, prompts.name).get("default_prompt_name")):
        check.fail("Reranker", "default_prompt_name", "unset, for no prompt is added here", repr(name))
    length = folder / "sentence_bert_config.json"
    return pooling, "Normalize" in modules, read_json(folder, length.name).get("max_seq_length") if length.exists() else None
