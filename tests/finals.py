"""Every served way from text, or token ids, to the numbers that a user reads: models, Reranker, the systems' stand-ins, ops.

For what must hold of all of them: what PyTorch and NumPy compute in between (test_between.py), and yesterday's hashes
(test_golden.py). Weights are drawn by cases.py, for torch.randn has other bits without AVX2. A way is made first (`WAYS`),
which loads and patches, and run after that.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import lora
import models
import rerank_kernels as rk
import systems
from cases import DTYPES, numbers
from models import CORPUS, DECODERS, FAMILIES, padded
from rerank_kernels.models import registry as served
from rerank_kernels.ops.pooling import POOL_MODES

Run = Callable[[], list[Tensor]]

QUERY, TEXTS = CORPUS[0], list(CORPUS)
PAIRS = [(query, text) for query in CORPUS[:2] for text in CORPUS]
LENGTHS = (5, 1, 33, 70, 64)


def model(family: str = "xlm-roberta", *, head: bool = True, labels: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    """models.tiny with the vocabulary of models.tokenizer, and weights that are the same on every machine."""
    own = tokenizer(family)
    made = models.tiny(family, head=head, vocab_size=len(own), pad_token_id=own.pad_token_id, num_labels=labels)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.copy_(numbers(name, tuple(p.shape), torch.float32, 2.0**-3))
            if models.is_norm(name):
                p.add_(1.0)
    return made.to(dtype)


tokenizer = functools.cache(models.tokenizer)


def _tensors(*values: Any) -> list[Tensor]:
    return [v if isinstance(v, Tensor) else torch.from_numpy(np.asarray(v, np.float32)) for v in values]


# ---- models by themselves ---------------------------------------------------------------------------------------------------


def _forward(family: str, head: bool, dtype: torch.dtype) -> Run:
    """Each argument that a patched forward takes, and the packed entry."""
    own = model(family, head=head, dtype=dtype)
    rk.patch(own)
    pad = own.config.pad_token_id
    rows = [ids % (models.VOCABULARY - 8) + 8 for ids in models.rows(LENGTHS)]
    long = [(torch.arange(120) * 7 + i) % 150 + 5 for i in range(10)]  # so many tokens are not taken at once
    flat, cu = torch.cat(rows), torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32)
    right, left, alone = padded(rows, pad), padded(rows, pad, left=True, to=80), rows[3][None]
    types = {} if family in models.UNTYPED else {"token_type_ids": torch.zeros_like(right["input_ids"])}
    flat_types = torch.zeros_like(flat) if types else None

    def run() -> list[Tensor]:
        out = [own(**inputs) for inputs in (right, left, padded(long, pad), {"input_ids": alone})]
        out.append(own(**right, **types, output_hidden_states=True))
        out.append(own(input_ids=alone, position_ids=torch.arange(2, 72)[None]))
        words = own.get_input_embeddings()(right["input_ids"]).detach()
        out.append(own(inputs_embeds=words, attention_mask=right["attention_mask"].bool()))
        found = [t for one in out for t in one.to_tuple()]
        if head:
            packed: list[Tensor] = list(served.packed_logits(own, flat, cu, flat_types))
        else:
            packed = [served.packed_embeddings(own, flat, cu, pooling=pooling) for pooling in ("mean", "cls")]
        return [t for one in (*found, *packed) for t in (one if isinstance(one, tuple) else (one,))]

    return run


def _lora(family: str, dtype: torch.dtype) -> Run:
    """Adapters on layers and in a head of RoBERTa's, two at once; and a head of the adapter's own."""
    own = lora.adapted(model(family), ("query", "value", "dense"), saves=family == "bert")
    with torch.no_grad():
        for name, p in own.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.copy_(numbers(name, tuple(p.shape), torch.float32, 2.0**-3))
    own.to(dtype)
    rk.patch(own)
    batch = padded(
        [ids % (models.VOCABULARY - 8) + 8 for ids in models.rows(LENGTHS)], own.base_model.model.config.pad_token_id
    )

    def run() -> list[Tensor]:
        made = []
        for names in (("default",), ("other",), () if family == "bert" else ("default", "other")):
            own.set_adapter(*names)
            made.append(own(**batch).logits)
        return made

    return run


def _decoder(kind: str, dtype: torch.dtype, **changes: str) -> Run:
    """Whole, cached in chunks and greedily generated; a head; the cache that forgets what a window hides."""
    classes = ("ForCausalLM", "ForSequenceClassification")
    own, headed = (models.decoder(kind, cls=cls, num_labels=1, **changes) for cls in classes)
    for one in (own, headed):
        with torch.no_grad():
            for name, p in one.named_parameters():
                p.copy_(numbers(name, tuple(p.shape), torch.float32, 2.0**-3))
                if "norm" in name and not kind.startswith("gemma"):
                    p.add_(1.0)
        one.to(dtype)
        rk.patch(one)
    rows = models.rows(LENGTHS)
    flat, cu = torch.cat(rows), torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32)
    left, right, long = padded(rows, 0, left=True, to=80), padded(rows, 0), rows[3][None]

    def run() -> list[Tensor]:
        made = [own(**left, use_cache=False).logits, own(**right, output_hidden_states=True).hidden_states[-1]]
        cache = DynamicCache(config=own.config)
        made += [own(input_ids=part, past_key_values=cache).logits for part in long.split(13, 1)]
        ids = own.generate(**left, max_new_tokens=5, do_sample=False)
        if getattr(own.config, "final_logit_softcapping", None):
            made += served.packed_answers(own, flat, cu, 7, 90)
        return [*made, ids.int().view(torch.float32), headed(**right).logits, *served.packed_logits(headed, flat, cu)]

    return run


# ---- Reranker ---------------------------------------------------------------------------------------------------------------


def _cross_encoder(family: str, dtype: torch.dtype) -> Run:
    reranker = rk.Reranker(model(family, dtype=dtype), tokenizer(family), max_length=130)

    def run() -> list[Tensor]:
        ranked = reranker.rank(QUERY, TEXTS)
        return _tensors(*reranker.score(PAIRS), *([r.index, r.logit, r.score, r.complement] for r in ranked))

    return run


def _embeddings(pooling: str, dtype: torch.dtype) -> Run:
    """Vectors of length 1, the cosines of pairs and their complements."""
    reranker = rk.Reranker(model(head=False, dtype=dtype), tokenizer("xlm-roberta"), kind="embedding", max_length=130)
    reranker.pooling = pooling

    def run() -> list[Tensor]:
        ranked = reranker.rank(QUERY, TEXTS, 4)
        return _tensors(reranker.encode(TEXTS), *reranker.score(PAIRS), *([r.index, r.logit, r.complement] for r in ranked))

    return run


# ---- systems ----------------------------------------------------------------------------------------------------------------


def _sentence_transformers(cls: Any, argument: str) -> Run:
    encoder, labelled = cls(model()), cls(model(labels=3))
    rk.patch(encoder), rk.patch(labelled)

    def run() -> list[Tensor]:
        made = [encoder.predict(PAIRS), encoder.predict(PAIRS, **{argument: nn.Identity()})]
        made += [labelled.predict(PAIRS, apply_softmax=True, **{argument: nn.Identity()})]
        made += [[one["score"] for one in encoder.rank(QUERY, TEXTS)]]
        return _tensors(*made)

    return run


def _embedder(*more: nn.Module, mode: str = "mean", cls: Any = systems.SentenceTransformer) -> Any:
    parts = systems.Transformer(model(head=False), "token_embeddings"), systems.Pooling(mode)
    made = cls(*parts, *more).eval()
    made.tokenizer = tokenizer("xlm-roberta")
    return made


def _dense() -> nn.Module:
    dense = systems.Dense(24, nn.Tanh())
    with torch.no_grad():
        for name, p in dense.named_parameters():
            p.copy_(numbers(name, tuple(p.shape), torch.float32, 2.0**-3))
    return dense


def _sentence_transformer() -> Run:
    normed, bare, cut = _embedder(systems.Normalize()), _embedder(mode="cls"), _embedder(_dense(), systems.Normalize())
    cut.truncate_dim = 20
    for one in (normed, bare, cut):
        rk.patch(one)

    def run() -> list[Tensor]:
        made = [one.encode(TEXTS, normalize_embeddings=flag) for one in (normed, bare, cut) for flag in (False, True)]
        return _tensors(*made, np.stack(cut.encode(TEXTS, normalize_embeddings=True, convert_to_numpy=False)))

    return run


def _flag() -> Run:
    reranker = systems.BaseReranker(model())
    rk.patch(reranker)
    return lambda: _tensors(reranker.compute_score(PAIRS, 7))


def _drawn(own: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A decoder of systems.llm with weights that are the same on every machine."""
    with torch.no_grad():
        for name, p in own.named_parameters():
            p.copy_(numbers(name, tuple(p.shape), torch.float32, 2.0**-3))
            if "norm" in name and own.config.model_type != "gemma":
                p.add_(1.0)
    return own.to(dtype)


def _llm(kind: str) -> Run:
    reranker = rk.Reranker(_drawn(systems.llm(kind)), systems.llm_tokenizer(), max_length=400)

    def run() -> list[Tensor]:
        ranked = reranker.rank(QUERY, TEXTS[:4])
        return _tensors(*reranker.score(PAIRS[:6]), *([r.index, r.logit, r.score, r.complement] for r in ranked))

    return run


def _answering() -> Run:
    yes, no = systems.llm_tokenizer().convert_tokens_to_ids(["yes", "no"])
    encoder = systems.CrossEncoder(_drawn(systems.llm()), None, systems.LogitScore(yes, no))
    rk.patch(encoder)
    return lambda: _tensors(encoder.predict(PAIRS), [one["score"] for one in encoder.rank(QUERY, TEXTS)])


def _flag_llm() -> Run:
    reranker = systems.BaseLLMReranker(_drawn(systems.llm("gemma")))
    embedder = systems.BaseLLMEmbedder(_drawn(systems.llm(cls="Model"), torch.float32))
    rk.patch(reranker), rk.patch(embedder)
    return lambda: _tensors(reranker.compute_score(PAIRS[:6], batch_size=4), embedder.encode(TEXTS, 7))


def _flag_model() -> Run:
    embedders = [systems.BaseEmbedder(model(head=False), pooling) for pooling in ("cls", "mean")]
    for one in embedders:
        rk.patch(one)
    return lambda: _tensors(*(one.encode(TEXTS, 7, convert_to_numpy=numpy) for one in embedders for numpy in (True, False)))


def _wrapped() -> Run:
    """LangChain and LlamaIndex around sentence-transformers."""
    ranker, texts = systems.HuggingFaceCrossEncoder(systems.CrossEncoder(model())), systems.HuggingFaceEmbeddings(_embedder())
    nodes, vectors = (
        systems.SentenceTransformerRerank(systems.CrossEncoder(model()), 9),
        systems.HuggingFaceEmbedding(_embedder()),
    )
    for one in (ranker, texts, nodes, vectors):
        rk.patch(one)
    documents = [systems.Document(str(i), text) for i, text in enumerate(TEXTS)]

    def run() -> list[Tensor]:
        ranked = [node.score for node in nodes._postprocess_nodes(documents, QUERY)]
        return _tensors(ranker.score(PAIRS), texts.embed_documents(TEXTS), ranked, vectors._get_text_embeddings(TEXTS))

    return run


def _haystack(cls: Any, **options: Any) -> Run:
    ranker = cls(model)
    rk.patch(ranker)
    ranker.warm_up()
    documents = [systems.Document(str(i), text) for i, text in enumerate(TEXTS)]

    def run() -> list[Tensor]:
        found = [ranker.run(query=QUERY, documents=documents, **one) for one in ({}, options)]
        return _tensors(*([d.score for d in one["documents"]] for one in found))

    return run


def _infinity() -> Run:
    replicas = {
        "reranker": systems.CrossEncoderPatched(model()),
        "bare": _embedder(cls=systems.SentenceTransformerPatched),
        "normed": _embedder(systems.Normalize(), cls=systems.SentenceTransformerPatched),
    }
    array = systems.AsyncEngineArray(**{name: systems.AsyncEmbeddingEngine(one) for name, one in replicas.items()})
    rk.patch(array)

    def run() -> list[Tensor]:
        ranked = [
            asyncio.run(array.rerank(model="reranker", query=QUERY, docs=TEXTS, raw_scores=raw))[0] for raw in (False, True)
        ]
        vectors = [asyncio.run(array.embed(model=name, sentences=TEXTS)) for name in ("bare", "normed")]
        return _tensors(*([one.relevance_score for one in each] for each in ranked), *vectors)

    return run


def _short(dtype: torch.dtype) -> str:
    return str(dtype)[6:]


WAYS: dict[str, Callable[[], Run]] = {
    **{
        f"{family} {'classifier' if head else 'encoder'}, {_short(dtype)}": functools.partial(_forward, family, head, dtype)
        for family in FAMILIES
        for head in (True, False)
        for dtype in DTYPES
    },
    **{
        f"{family} with LoRA, {_short(dtype)}": functools.partial(_lora, family, dtype)
        for family in ("bert", "roberta")
        for dtype in DTYPES
    },
    **{
        f"{kind} decoder, {_short(dtype)}": functools.partial(_decoder, kind, dtype)
        for kind in DECODERS
        for dtype in (torch.float32, torch.bfloat16)
    },
    **{
        f"llama decoder, {act}, {_short(dtype)}": functools.partial(_decoder, "llama", dtype, hidden_act=act)
        for act in ("relu", "relu2")
        for dtype in (torch.float32, torch.bfloat16)
    },
    **{
        f"Reranker, {family} cross-encoder, {_short(dtype)}": functools.partial(_cross_encoder, family, dtype)
        for family in FAMILIES
        for dtype in DTYPES[:2]
    },
    **{
        f"Reranker, embeddings, {pooling}, {_short(dtype)}": functools.partial(_embeddings, pooling, dtype)
        for pooling in POOL_MODES
        for dtype in DTYPES[:2]
    },
    **{f"Reranker, {kind} that answers, bfloat16": functools.partial(_llm, kind) for kind in ("qwen3", "gemma")},
    "sentence-transformers CrossEncoder, a decoder that answers": _answering,
    "FlagEmbedding FlagLLMReranker and FlagLLMModel": _flag_llm,
    "sentence-transformers 3 CrossEncoder": lambda: _sentence_transformers(systems.CrossEncoder3, "activation_fct"),
    "sentence-transformers 6 CrossEncoder": lambda: _sentence_transformers(systems.CrossEncoder, "activation_fn"),
    "sentence-transformers SentenceTransformer": _sentence_transformer,
    "FlagEmbedding FlagReranker": _flag,
    "FlagEmbedding FlagModel": _flag_model,
    "LangChain and LlamaIndex": _wrapped,
    "Haystack TransformersSimilarityRanker": lambda: _haystack(
        systems.TransformersSimilarityRanker, calibration_factor=0.3, score_threshold=0.4
    ),
    "Haystack SentenceTransformersSimilarityRanker": lambda: _haystack(
        systems.SentenceTransformersSimilarityRanker, scale_score=False
    ),
    "Infinity AsyncEngineArray": _infinity,
}
