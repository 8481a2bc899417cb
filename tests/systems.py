"""What stands for the systems of rerank_kernels/patching/systems where they are not installed; the real ones are in stacks/.

Classes with the real ones' modules and names, by which they are found, and with those lines of the real ones that decide about
a bit: sigmoids, sorts, batches. `installed` makes them importable, for pickle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from models import decoder, tiny, tokenizer
from rerank_kernels.models.sentence import stock_pooling


def of(module: str) -> Any:
    """A class decorator: as if it were defined in `module`."""

    def mark(cls: type) -> type:
        cls.__module__ = module
        for method in vars(cls).values():
            if isinstance(method, types.FunctionType):
                method.__module__ = module
        FAKES.append(cls)
        return cls

    return mark


FAKES: list[type] = []


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """The modules of the fakes can be imported, as pickle does."""
    names = {".".join(cls.__module__.split(".")[:n]) for cls in FAKES for n in range(1, cls.__module__.count(".") + 2)}
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    for cls in FAKES:
        setattr(sys.modules[cls.__module__], cls.__name__, cls)
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def model(num_labels: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    own = tokenizer("xlm-roberta")
    return tiny("xlm-roberta", dtype, vocab_size=len(own), pad_token_id=own.pad_token_id, num_labels=num_labels)


WORDS = ["Yes", "yes", "no"]


@functools.cache
def llm_tokenizer(side: str = "left") -> Any:
    """With words that answer, one token each. sentence-transformers pads decoders left; gemma's tokenizer pads right."""
    own = tokenizer("roberta")
    own.add_tokens(WORDS)
    own.bos_token, own.padding_side = "<s>", side
    return own


def llm(kind: str = "qwen3", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    own = llm_tokenizer()
    return decoder(kind, dtype, vocab_size=len(own), pad_token_id=own.pad_token_id, max_position_embeddings=512, **options)


def _padded(pairs: Any, own: Any) -> Any:
    queries, documents = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return own(queries, documents, padding=True, truncation=True, return_tensors="pt")


# ---- sentence-transformers --------------------------------------------------------------------------------------------------


@of("sentence_transformers.cross_encoder.CrossEncoder")
class CrossEncoder3:
    """Version 3: a plain object; batches in the order given; scores as numpy's."""

    def __init__(self, inner: Any, default_activation_function: Any = None) -> None:
        self.model, self.tokenizer, self.config = inner, tokenizer("xlm-roberta"), inner.config
        self.default_activation_function = default_activation_function or nn.Sigmoid()

    def predict(
        self, sentences: Any, batch_size: int = 32, show: Any = None, activation_fct: Any = None,
        apply_softmax: Any = False, convert_to_numpy: bool = True, convert_to_tensor: bool = False,
    ) -> Any:  # fmt: skip
        if activation_fct is None:
            activation_fct = self.default_activation_function
        scores: Any = []
        with torch.no_grad():
            for start in range(0, len(sentences), batch_size):
                features = _padded(sentences[start : start + batch_size], self.tokenizer)
                logits = activation_fct(self.model(**features, return_dict=True).logits)
                if apply_softmax and len(logits[0]) > 1:
                    logits = nn.functional.softmax(logits, dim=1)
                scores.extend(logits)
        if self.config.num_labels == 1:
            scores = [score[0] for score in scores]
        if convert_to_tensor:
            return torch.stack(scores)
        return np.asarray([score.cpu().float().numpy() for score in scores]) if convert_to_numpy else scores

    def rank(
        self, query: str, documents: list[str], top_k: Any = None, return_documents: bool = False, batch_size: int = 32,
        activation_fct: Any = None, convert_to_tensor: bool = False,
    ) -> Any:  # fmt: skip
        pairs = [[query, document] for document in documents]
        scores = self.predict(pairs, batch_size, activation_fct=activation_fct, convert_to_tensor=convert_to_tensor)
        results = [{"corpus_id": i, "score": score} for i, score in enumerate(scores)]
        if return_documents:
            results = [{**one, "text": documents[one["corpus_id"]]} for one in results]
        return sorted(results, key=lambda one: one["score"], reverse=True)[:top_k]


CrossEncoder3.__name__ = CrossEncoder3.__qualname__ = "CrossEncoder"


@of("sentence_transformers.base.modules.transformer")
class Transformer(nn.Module):
    """Of a CrossEncoder or a SentenceTransformer, by `output`."""

    can_flatten_inputs = False

    def __init__(self, inner: Any, output: str = "scores") -> None:
        super().__init__()
        self.model, self.output = inner, output

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        given = {k: v for k, v in features.items() if k in ("input_ids", "attention_mask")}
        if self.output == "causal_logits":
            given |= {"logits_to_keep": 1, "use_cache": False}
        return {**features, self.output: self.model(**given)[0]}


@of("sentence_transformers.cross_encoder.modules.logit_score")
class LogitScore(nn.Module):
    module_input_name = "causal_logits"

    def __init__(self, true_token_id: int, false_token_id: Any = None) -> None:
        super().__init__()
        self.true_token_id, self.false_token_id = true_token_id, false_token_id

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        logits = features[self.module_input_name][:, -1]
        scores = logits[:, self.true_token_id]
        if self.false_token_id is not None:
            scores = scores - logits[:, self.false_token_id]
        return {**features, "scores": scores.unsqueeze(1)}


@of("sentence_transformers.cross_encoder.model")
class CrossEncoder(nn.Sequential):
    """Version 6: a sequence of modules; batches by length; scores as floats."""

    backend = "torch"

    def __init__(self, inner: Any, activation_fn: Any = None, *more: nn.Module) -> None:
        super().__init__(Transformer(inner, "causal_logits" if more else "scores"), *more)
        self.__dict__["activation_fn"] = activation_fn or nn.Sigmoid()  # no submodule, by a __setattr__ of its own
        self.tokenizer, self.keep_in_fp32_modules = llm_tokenizer() if more else tokenizer("xlm-roberta"), []

    @property
    def model(self) -> Any:
        return self[0].model

    @property
    def num_labels(self) -> int:
        return 1 if len(self) > 1 else int(self.model.config.num_labels)

    def predict(
        self, inputs: Any, prompt_name: Any = None, batch_size: int = 32, activation_fn: Any = None,
        apply_softmax: Any = False, convert_to_tensor: bool = False,
    ) -> Any:  # fmt: skip
        scores = self._inference(
            inputs, batch_size, self.activation_fn if activation_fn is None else activation_fn, apply_softmax
        )
        return scores if convert_to_tensor else scores.float().numpy()

    @torch.inference_mode()
    def _inference(self, inputs: Any, batch_size: int, activation_fn: Any, apply_softmax: Any) -> Any:
        order = np.argsort([-len(query + document) for query, document in inputs])
        done: list[Any] = []
        for start in range(0, len(inputs), batch_size):
            scores = self(dict(_padded([inputs[i] for i in order[start : start + batch_size]], self.tokenizer)))["scores"]
            scores = activation_fn(scores.float())
            if self.num_labels == 1:
                scores = scores.squeeze(-1)
            done.extend(nn.functional.softmax(scores, dim=1) if apply_softmax and scores.ndim > 1 else scores)
        return torch.stack([done[i] for i in np.argsort(order)])

    def rank(
        self, query: str, documents: list[str], top_k: Any = None, return_documents: bool = False, batch_size: int = 32,
        activation_fn: Any = None, **deprecated: Any,
    ) -> Any:  # fmt: skip
        pairs = [(query, document) for document in documents]
        scores = self.predict(pairs, batch_size=batch_size, activation_fn=activation_fn, convert_to_tensor=True).tolist()
        results = [{"corpus_id": i, "score": score} for i, score in enumerate(scores)]
        if return_documents:
            results = [{**one, "text": documents[one["corpus_id"]]} for one in results]
        return sorted(results, key=lambda one: one["score"], reverse=True)[:top_k]


@of("sentence_transformers.sentence_transformer.modules.pooling")
class Pooling(nn.Module):
    def __init__(self, pooling_mode: Any = "mean", include_prompt: bool = True) -> None:
        super().__init__()
        self.pooling_mode, self.include_prompt = pooling_mode, include_prompt

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        mask = features["attention_mask"].clone()
        if not self.include_prompt and "prompt_length" in features:
            mask[:, : features["prompt_length"]] = 0
        return {**features, "sentence_embedding": stock_pooling(features["token_embeddings"], mask, self._mode())}

    def _mode(self) -> str:
        return self.pooling_mode if isinstance(self.pooling_mode, str) else self.pooling_mode[0]


@of("sentence_transformers.base.modules.normalize")
class Normalize(nn.Module):
    module_input_name = module_output_name = "sentence_embedding"

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return {**features, "sentence_embedding": nn.functional.normalize(features["sentence_embedding"], dim=-1)}


@of("sentence_transformers.base.modules.dense")
class Dense(nn.Module):
    module_input_name = module_output_name = "sentence_embedding"

    def __init__(self, width: int, activation_function: Any) -> None:
        super().__init__()
        self.linear, self.activation_function = nn.Linear(64, width), activation_function

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        x = features[self.module_input_name]
        return {**features, self.module_output_name: self.activation_function(self.linear(x))}


@of("sentence_transformers.sentence_transformer.model")
class SentenceTransformer(nn.Sequential):
    truncate_dim = None

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        self.tokenizer = tokenizer("xlm-roberta")

    def encode(
        self, inputs: Any, batch_size: int = 32, output_value: Any = "sentence_embedding", precision: str = "float32",
        convert_to_numpy: bool = True, normalize_embeddings: bool = False, prompt: str = "",
    ) -> Any:  # fmt: skip
        texts = [inputs] if isinstance(inputs, str) else inputs
        done: list[Any] = []
        with torch.no_grad():
            for start in range(0, len(texts), batch_size):
                batch = [prompt + text for text in texts[start : start + batch_size]]
                features = dict(self.tokenizer(batch, padding=True, truncation=True, return_tensors="pt"))
                if prompt:
                    features["prompt_length"] = len(self.tokenizer(prompt)["input_ids"]) - 1
                vectors = self(features)[output_value]
                vectors = vectors[..., : self.truncate_dim]
                done.extend(nn.functional.normalize(vectors, dim=1) if normalize_embeddings else vectors)
        if convert_to_numpy:
            done = [vector.float().numpy() for vector in done]
        return done[0] if isinstance(inputs, str) else np.stack(done) if convert_to_numpy else done


# ---- FlagEmbedding ----------------------------------------------------------------------------------------------------------


@of("FlagEmbedding.inference.reranker.encoder_only.base")
class BaseReranker:
    def __init__(self, inner: Any) -> None:
        self.model, self.tokenizer, self.pool, self.use_fp16 = inner, tokenizer("xlm-roberta"), None, False

    def compute_score(self, pairs: Any, batch_size: int = 32) -> Any:
        return self.compute_score_single_gpu(pairs, batch_size)

    @torch.no_grad()
    def compute_score_single_gpu(self, pairs: Any, batch_size: int = 32) -> Any:
        if self.use_fp16:
            self.model.half()
        self.model.to("cpu")
        order = np.argsort([-len(query + document) for query, document in pairs])
        scores: list[float] = []
        for start in range(0, len(pairs), batch_size):
            features = _padded([pairs[i] for i in order[start : start + batch_size]], self.tokenizer)
            scores.extend(self.model(**features, return_dict=True).logits.view(-1).float().tolist())
        return [scores[i] for i in np.argsort(order)]


@of("FlagEmbedding.inference.reranker.decoder_only.base")
class BaseLLMReranker:
    """Tokens in pieces, sorted, padded to eights; the first batch twice; the logits of all words, of which one is read."""

    prompt = "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    prompt += "prediction of either 'Yes' or 'No'."

    def __init__(self, inner: Any, own: Any = None) -> None:
        self.model, self.tokenizer, self.pool, self.use_fp16 = inner, own or llm_tokenizer("right"), None, True
        self.yes_loc = self._ids("Yes")[0]

    def _ids(self, text: str, **options: Any) -> Any:
        return self.tokenizer(text, add_special_tokens=False, **options)["input_ids"]

    def compute_score(self, pairs: Any, **options: Any) -> Any:
        pairs = [pairs] if isinstance(pairs[0], str) else pairs
        return self.compute_score_single_gpu([(f"A: {q}", f"B: {d}") for q, d in pairs], device="cpu", **options)

    @torch.no_grad()
    def compute_score_single_gpu(
        self, sentence_pairs: Any, batch_size: int = 128, max_length: int = 512, normalize: bool = False, device: Any = None
    ) -> Any:
        if device == "cpu":
            self.use_fp16 = False
        self.model.to(device), self.model.eval()
        sep, prompt, bos = self._ids("\n"), self._ids(self.prompt), self.tokenizer.bos_token_id
        rows = []
        for query, passage in sentence_pairs:
            first = [] if bos is None or bos == self.tokenizer.pad_token_id else [bos]
            first = first + self._ids(query, max_length=max_length * 3 // 4, truncation=True)
            second = sep + self._ids(passage, max_length=max_length, truncation=True)
            rows.append((first + second)[: max_length + len(sep) + len(prompt)] + sep + prompt)
        order = np.argsort([-len(row) for row in rows])

        def batch(start: int) -> Any:
            ids = [rows[i] for i in order[start : start + batch_size]]
            given = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
            features = self.tokenizer.pad(given, padding=True, pad_to_multiple_of=8, return_tensors="pt")
            features = {name: t.to(device) for name, t in features.items()}
            return self.model(**features, output_hidden_states=True).logits, features["attention_mask"]

        while batch_size:
            try:
                batch(0)
                break
            except RuntimeError:
                batch_size = batch_size * 3 // 4
        scores: list[float] = []
        for start in range(0, len(rows), batch_size):
            logits, mask = batch(start)
            if mask[:, -1].all():
                last = logits[:, -1]
            else:
                last = torch.stack([one[n - 1] for one, n in zip(logits, mask.sum(1), strict=True)])
            scores.extend(last[:, self.yes_loc].cpu().float().tolist())
        scores = [scores[i] for i in np.argsort(order)]
        return [float(1 / (1 + np.exp(-score))) for score in scores] if normalize else scores


@of("FlagEmbedding.inference.embedder.encoder_only.base")
class BaseEmbedder:
    stopped = 0

    def __init__(self, inner: Any, pooling_method: str = "cls", normalize_embeddings: bool = True) -> None:
        self.model, self.tokenizer, self.pool = inner, tokenizer("xlm-roberta"), None
        self.pooling_method, self.normalize_embeddings, self.truncate_dim = pooling_method, normalize_embeddings, None

    def __del__(self) -> None:
        type(self).stopped += 1  # the real one stops its workers and moves its model

    def encode(self, sentences: Any, batch_size: int = 256, convert_to_numpy: bool = True, **options: Any) -> Any:
        return self.encode_single_device(sentences, batch_size, convert_to_numpy=convert_to_numpy, device="cpu", **options)

    @torch.no_grad()
    def encode_single_device(
        self, sentences: Any, batch_size: int = 256, max_length: int = 512, convert_to_numpy: bool = True, device: Any = None,
        **options: Any,
    ) -> Any:  # fmt: skip
        texts = [sentences] if isinstance(sentences, str) else sentences
        order = np.argsort([-len(text) for text in texts])
        done: list[Any] = []
        for start in range(0, len(texts), batch_size):
            batch = [texts[i] for i in order[start : start + batch_size]]
            features = self.tokenizer(batch, padding=True, truncation=True, return_tensors="pt", **options)
            vectors = self.pooling(self.model(**features, return_dict=True).last_hidden_state, features["attention_mask"])
            vectors = vectors[..., : self.truncate_dim]
            if self.normalize_embeddings:
                vectors = nn.functional.normalize(vectors, dim=-1)
            done.append(vectors.numpy() if convert_to_numpy else vectors)
        made = np.concatenate(done) if convert_to_numpy else torch.cat(done)
        made = made[np.argsort(order)]
        return made[0] if isinstance(sentences, str) else made

    def pooling(self, last_hidden_state: Any, attention_mask: Any = None) -> Any:
        if self.pooling_method == "cls":
            return last_hidden_state[:, 0]
        if self.pooling_method != "mean":
            raise NotImplementedError(f"pooling method {self.pooling_method} not implemented")
        kept = attention_mask[..., None].float()
        return (last_hidden_state * kept).sum(1) / kept.sum(1)


@of("FlagEmbedding.inference.embedder.decoder_only.base")
class BaseLLMEmbedder:
    """The last token of each text, of a decoder."""

    def __init__(self, inner: Any) -> None:
        self.model, self.tokenizer, self.pool = inner, llm_tokenizer("right"), None
        self.normalize_embeddings, self.truncate_dim = True, None

    def encode(self, sentences: Any, batch_size: int = 256, convert_to_numpy: bool = True) -> Any:
        return self.encode_single_device(sentences, batch_size, convert_to_numpy=convert_to_numpy, device="cpu")

    @torch.no_grad()
    def encode_single_device(
        self, sentences: Any, batch_size: int = 256, max_length: int = 512, convert_to_numpy: bool = True, device: Any = None,
        **options: Any,
    ) -> Any:  # fmt: skip
        if device == "cpu":
            self.model.float()
        texts = [sentences] if isinstance(sentences, str) else sentences
        done: list[Any] = []
        for start in range(0, len(texts), batch_size):
            features = self.tokenizer(texts[start : start + batch_size], padding=True, return_tensors="pt", **options)
            states, mask = self.model(**features, return_dict=True).last_hidden_state, features["attention_mask"]
            last = mask.shape[1] - 1 if mask[:, -1].all() else mask.sum(1) - 1
            vectors = states[torch.arange(len(states)), last][..., : self.truncate_dim]
            done.append(nn.functional.normalize(vectors, dim=-1) if self.normalize_embeddings else vectors)
        made = torch.cat(done)[0] if isinstance(sentences, str) else torch.cat(done)
        return made.numpy() if convert_to_numpy else made


@of("FlagEmbedding.inference.embedder.encoder_only.m3")
class M3Embedder:
    model = None


# ---- LangChain and LlamaIndex -----------------------------------------------------------------------------------------------


class Pydantic:
    """As pydantic's models: private attributes lie outside of __dict__."""

    def __init__(self, **private: Any) -> None:
        object.__setattr__(self, "__pydantic_private__", private)

    def __getattr__(self, name: str) -> Any:
        private = vars(self).get("__pydantic_private__", {})
        if name not in private:
            raise AttributeError(name)
        return private[name]


class _Embeddings(Pydantic):
    """LangChain's."""

    encode_kwargs: dict[str, Any]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self._embed(texts, self.encode_kwargs)

    def embed_query(self, text: str) -> list[float]:
        return self._embed([text], self.encode_kwargs)[0]

    def _embed(self, texts: list[str], encode_kwargs: dict[str, Any]) -> list[list[float]]:
        client = self._client if hasattr(self, "_client") else self.client
        return client.encode([text.replace("\n", " ") for text in texts], **encode_kwargs).tolist()


@of("langchain_huggingface.embeddings.huggingface")
class HuggingFaceEmbeddings(_Embeddings):
    def __init__(self, client: Any, **encode_kwargs: Any) -> None:
        super().__init__(_client=client)
        self.encode_kwargs = encode_kwargs


@of("langchain_community.embeddings.huggingface")
class HuggingFaceBgeEmbeddings(_Embeddings):
    def __init__(self, client: Any, **encode_kwargs: Any) -> None:
        super().__init__()
        self.client, self.encode_kwargs = client, encode_kwargs


@of("langchain_community.cross_encoders.huggingface")
class HuggingFaceCrossEncoder(Pydantic):
    def __init__(self, client: Any) -> None:
        super().__init__()
        self.client = client

    def score(self, text_pairs: Any) -> Any:
        scores = self.client.predict(text_pairs)
        return [one[1] for one in scores] if len(scores.shape) > 1 else scores


@of("llama_index.postprocessor.sbert_rerank.base")
class SentenceTransformerRerank(Pydantic):
    def __init__(self, model: Any, top_n: int = 2) -> None:
        super().__init__(_model=model)
        self.top_n = top_n

    def _postprocess_nodes(self, nodes: Any, query: str) -> Any:
        scores = self._model.predict([(query, node.content) for node in nodes])
        scored = [dataclasses.replace(node, score=float(score)) for node, score in zip(nodes, scores, strict=True)]
        return sorted(scored, key=lambda node: -node.score if node.score else 0)[: self.top_n]


@of("llama_index.embeddings.huggingface.base")
class HuggingFaceEmbedding(Pydantic):
    def __init__(self, model: Any, normalize: bool = True) -> None:
        super().__init__(_model=model)
        self.normalize, self.embed_batch_size = normalize, 10

    def _embed(self, inputs: list[str]) -> list[list[float]]:
        made = self._model.encode(inputs, batch_size=self.embed_batch_size, normalize_embeddings=self.normalize)
        return made.tolist()  # type: ignore[no-any-return]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._embed([query])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._embed(texts)


# ---- Haystack ---------------------------------------------------------------------------------------------------------------


@of("haystack.dataclasses.document")
@dataclasses.dataclass
class Document:
    id: str
    content: str
    score: Any = None


@of("haystack.components.rankers.transformers_similarity")
class TransformersSimilarityRanker:
    def __init__(self, load: Any, top_k: int = 10, scale_score: bool = True, score_threshold: Any = None) -> None:
        self.load, self.model, self.tokenizer = load, None, tokenizer("xlm-roberta")
        self.top_k, self.scale_score, self.score_threshold = top_k, scale_score, score_threshold
        self.calibration_factor, self.batch_size = 1.0, 16

    def warm_up(self) -> None:
        if self.model is None:
            self.model = self.load()

    def run(
        self, query: str, documents: Any, top_k: Any = None, scale_score: Any = None, calibration_factor: Any = None,
        score_threshold: Any = None,
    ) -> Any:  # fmt: skip
        if self.model is None:
            self.warm_up()
        if not documents:
            return {"documents": []}
        top_k = top_k or self.top_k
        scale_score = scale_score or self.scale_score
        calibration_factor = calibration_factor or self.calibration_factor
        score_threshold = score_threshold or self.score_threshold
        if top_k <= 0:
            raise ValueError(f"top_k must be > 0, but got {top_k}")
        if scale_score and calibration_factor is None:
            raise ValueError("scale_score is True so calibration_factor must be provided")
        features = _padded([[query, document.content] for document in documents], self.tokenizer)
        found: list[Any] = []
        with torch.inference_mode():
            for start in range(0, len(documents), self.batch_size):
                batch = {k: v[start : start + self.batch_size] for k, v in features.items()}
                found.extend(self.model(**batch).logits.squeeze(dim=1))  # type: ignore[misc]
        scores = torch.stack(found)
        if scale_score:
            scores = torch.sigmoid(scores * calibration_factor)
        order = torch.sort(scores, descending=True)[1].tolist()
        ranked = [dataclasses.replace(documents[i], score=scores[i].item()) for i in order]
        return {"documents": [d for d in ranked if score_threshold is None or d.score >= score_threshold][:top_k]}


@of("haystack_integrations.components.rankers.sentence_transformers.sentence_transformers_similarity")
class SentenceTransformersSimilarityRanker:
    def __init__(self, load: Any) -> None:
        self.load, self.model, self._cross_encoder = load, "a name", None

    def warm_up(self) -> None:
        if self._cross_encoder is None:
            self._cross_encoder = CrossEncoder(self.load())

    def run(self, *, query: str, documents: Any, top_k: int = 10, scale_score: bool = True) -> Any:
        if self._cross_encoder is None:
            self.warm_up()
        inner: Any = self._cross_encoder
        activation = nn.Sigmoid() if scale_score else nn.Identity()
        texts = [document.content for document in documents]
        ranked = inner.rank(query=query, documents=texts, activation_fn=activation, convert_to_numpy=True)
        return {"documents": [dataclasses.replace(documents[r["corpus_id"]], score=r["score"]) for r in ranked][:top_k]}


# ---- Infinity ---------------------------------------------------------------------------------------------------------------


@of("infinity_emb.primitives")
@dataclasses.dataclass(frozen=True)
class RerankReturnType:
    relevance_score: float
    document: str
    index: int


@of("infinity_emb.transformer.crossencoder.torch")
class CrossEncoderPatched(CrossEncoder3):
    capabilities = frozenset(["rerank"])

    def scores(self, pairs: Any) -> Any:
        with torch.no_grad():
            return self.model(**_padded(pairs, self.tokenizer), return_dict=True)["logits"].flatten().float().numpy()


@of("infinity_emb.transformer.embedder.sentence_transformer")
class SentenceTransformerPatched(SentenceTransformer):
    capabilities, mode_colbert, normalize_embeddings = frozenset(["embed"]), False, True

    def encode_post(self, vectors: Any) -> Any:
        vectors = vectors.float()
        return (nn.functional.normalize(vectors, dim=1) if self.normalize_embeddings else vectors).numpy()


@of("infinity_emb.transformer.classifier.torch")
class SentenceClassifier:
    capabilities = frozenset(["classify"])


@of("infinity_emb.engine")
class AsyncEmbeddingEngine:
    def __init__(self, *replicas: Any, **settings: Any) -> None:
        self._model_replicas, self.capabilities = list(replicas), replicas[0].capabilities
        usual = {"vector_disk_cache_path": "", "served_model_name": "one", "dtype": types.SimpleNamespace(value="float32")}
        self.engine_args = types.SimpleNamespace(**(usual | settings))

    async def astart(self) -> None:
        print("started", flush=True)

    async def rerank(self, *, query: str, docs: Any, raw_scores: bool = False, top_n: Any = None) -> Any:
        scores = self._model_replicas[0].scores([[query, document] for document in docs])
        if not raw_scores:
            scores = 1 / (1 + np.exp(-scores))
        results = [RerankReturnType(scores[i], document, i) for i, document in enumerate(docs)]
        results = sorted(results, key=lambda one: one.relevance_score, reverse=True)
        return results[:top_n] if top_n is not None and top_n > 0 else results, len(docs)

    async def embed(self, sentences: Any) -> Any:
        replica = self._model_replicas[0]
        with torch.no_grad():
            features = dict(replica.tokenizer(sentences, padding=True, return_tensors="pt"))
            return replica.encode_post(replica(features)["sentence_embedding"])


@of("infinity_emb.engine")
class AsyncEngineArray:
    def __init__(self, **engines: Any) -> None:
        self.engines_dict = engines

    async def rerank(self, *, model: str, **request: Any) -> Any:
        return await self.engines_dict[model].rerank(**request)

    async def embed(self, *, model: str, **request: Any) -> Any:
        return await self.engines_dict[model].embed(**request)
