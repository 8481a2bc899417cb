"""Settings of a folder: what sentence-transformers makes of a folder, the Reranker makes of it too, or refuses it by name.

`folders` writes folders of many combinations of settings. They are compared with the real sentence-transformers where it is
installed; stacks/ has it always. What each setting means is held here without it too.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
import rerank_kernels as rk
from rerank_kernels.scoring import settings

TEXTS = ["Paris", "paris", "What is the capital of FRANCE?", "", "A reranker reads a query. " * 12]
QUERY, DOCUMENTS = "Which CITY is the capital?", TEXTS
OLD, NEW = "sentence_transformers.models.", "sentence_transformers.sentence_transformer.modules."


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def embedder(folder: Path) -> Path:
    """A tiny embedding model whose tokenizer knows capital letters from small ones."""
    own = models.tokenizer("bert")
    models.tiny("bert", head=False, vocab_size=len(own), pad_token_id=own.pad_token_id).save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


def cross_encoder(folder: Path) -> Path:
    return models.save_cross_encoder(folder, "roberta")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return embedder(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def cross(tmp_path_factory) -> Path:
    return cross_encoder(tmp_path_factory.mktemp("cross"))


def save(
    plain: Path,
    to: Path,
    *,
    pooling: Any = "mean",
    normalise: bool = True,
    names: str = NEW,
    place: str = "",
    transformer: dict[str, Any] | None = None,
    root: dict[str, Any] | None = None,
    model_max_length: int | None = None,
) -> Path:
    """An embedding model as sentence-transformers writes one."""
    shutil.copytree(plain, to / place, dirs_exist_ok=True)
    types = [names + "Transformer", names + "Pooling", *([names + "Normalize"] if normalise else [])]
    paths = [place, "1_Pooling", "2_Normalize"]
    entries = zip(types, paths, strict=False)
    write(to / "modules.json", [{"idx": i, "name": str(i), "path": p, "type": t} for i, (t, p) in enumerate(entries)])
    pooled = {"word_embedding_dimension": 64, **({"pooling_mode": pooling} if isinstance(pooling, str) else pooling)}
    write(to / "1_Pooling" / "config.json", pooled)
    if transformer is not None:
        write(to / place / "sentence_bert_config.json", transformer)
    if root is not None:
        write(to / "config_sentence_transformers.json", root)
    if model_max_length is not None:
        own = json.loads((to / place / "tokenizer_config.json").read_text())
        write(to / place / "tokenizer_config.json", {**own, "model_max_length": model_max_length})
    return to


def folders(plain: Path, to: Path) -> Iterator[tuple[str, Path]]:
    """Folders of all combinations of what is served; every value of a setting is in several of them."""
    poolings = (
        "mean",
        "cls",
        "max",
        "lasttoken",
        "weightedmean",
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": False},
        {"pooling_mode_weightedmean_tokens": True, "pooling_mode_mean_tokens": False},
    )
    limits: tuple[dict[str, Any], ...] = ({}, {"max_seq_length": 12}, {"max_seq_length": None}, {"max_seq_length": 100})
    prompts: tuple[dict[str, Any], ...] = (
        {},
        {"prompts": {"query": "query: ", "document": "passage: "}},
        {"prompts": {"query": "Q ", "x": "the x: "}, "default_prompt_name": "x"},
        {"prompts": {"query": "", "document": None}, "default_prompt_name": "query", "similarity_fn_name": "cosine"},
    )
    rest = itertools.cycle(itertools.product((NEW, OLD), ("", "0_Transformer"), (True, False), (None, 20)))
    for i, (pooling, limit, lower, said) in enumerate(itertools.product(poolings, limits, (None, True, False), prompts)):
        names, place, normalise, stored = next(rest)
        if i % 5 and i % 11:  # a part of them, in which all pairs of values meet
            continue
        transformer = {**limit, **({} if lower is None else {"do_lower_case": lower})}
        root = {"__version__": {"sentence_transformers": "3.0.0"}, "similarity_fn_name": "dot", **said}
        options: dict[str, Any] = dict(pooling=pooling, names=names, place=place, normalise=normalise, model_max_length=stored)
        name = f"{i}: {pooling} {transformer} {said} {place} {normalise} {stored}"
        yield name, save(plain, to / str(i), transformer=transformer, root=root, **options)


def near(ours: Any, theirs: Any, name: str) -> None:
    assert np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)).max() < 3e-5, name


def compare(plain: Path, tmp_path: Path) -> int:
    import sentence_transformers as st

    count = 0
    for name, folder in folders(plain, tmp_path):
        theirs, ours = st.SentenceTransformer(str(folder), device="cpu"), rk.Reranker(folder)
        near(ours.encode(TEXTS), theirs.encode(TEXTS), name)
        near(ours.encode(TEXTS, prompt_name="query"), theirs.encode(TEXTS, prompt_name="query"), name)
        queries, documents = theirs.encode_query([QUERY]), theirs.encode_document(DOCUMENTS)
        found = ours.score([(QUERY, document) for document in DOCUMENTS]).logit
        want = theirs.similarity(torch.from_numpy(queries), torch.from_numpy(documents))[0]
        assert (found - want.numpy()).__abs__().max() < 3e-5 * max(1.0, float(want.abs().max())), name
        count += 1
    print(count, "folders")
    return count


def test_sentence_transformers_makes_the_same_of_each_folder(plain, tmp_path) -> None:
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    if not hasattr(st.SentenceTransformer, "encode_query"):
        pytest.skip("this version has no encode_query()")
    assert compare(plain, tmp_path) > 60


def test_sentence_transformers_makes_the_same_of_a_cross_encoder(cross, tmp_path) -> None:
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    compare_cross_encoders(cross, tmp_path)


def compare_cross_encoders(cross: Path, tmp_path: Path) -> None:
    import sentence_transformers as st

    pairs = [(QUERY, document) for document in DOCUMENTS]
    for i, name in enumerate(("torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Sigmoid", None)):
        for place in ("sentence_transformers", "sbert_ce_default_activation_function"):
            folder = tmp_path / f"{i} {place}"
            shutil.copytree(cross, folder)
            config = json.loads((folder / "config.json").read_text())
            if name is not None:
                config[place] = {"activation_fn": name, "version": "4.0.0"} if place == "sentence_transformers" else name
            write(folder / "config.json", config)
            ours = rk.Reranker(folder)
            found = ours.score(pairs)
            want = st.CrossEncoder(str(folder), device="cpu").predict(pairs)
            near(found.logit if ours.settings.activation == "identity" else found.score, want, folder.name)
    saved = tmp_path / "saved"
    st.CrossEncoder(str(cross), device="cpu").save_pretrained(str(saved))
    near(rk.Reranker(saved).score(pairs).score, st.CrossEncoder(str(saved), device="cpu").predict(pairs), "saved")


# ---- what each setting means, without sentence-transformers ------------------------------------------------------------------


def test_lower_case_is_served(plain, tmp_path) -> None:
    """The smallest example: 'Paris' had an embedding with cosine 0.10 to the right one."""
    lowered = rk.Reranker(save(plain, tmp_path / "a", transformer={"do_lower_case": True}))
    usual = rk.Reranker(save(plain, tmp_path / "b"))
    assert lowered.encode(["Paris", "PARIS"]).tobytes() == usual.encode(["paris", "paris"]).tobytes()
    assert usual.encode(["Paris"]).tobytes() != usual.encode(["paris"]).tobytes()


def test_the_longest_text(plain, tmp_path) -> None:
    """What sentence_bert_config.json says stands before what the tokenizer says, and no text is longer than the positions."""
    for i, (said, stored, want) in enumerate(
        ((None, None, 130), (12, None, 12), (None, 12, 12), (20, 12, 20), (500, 12, models.POSITIONS), (None, 10**30, 140))
    ):
        transformer = None if said is None else {"max_seq_length": said}
        folder = save(plain, tmp_path / str(i), transformer=transformer, model_max_length=stored)
        assert rk.Reranker(folder).max_length == want, (said, stored)
    assert rk.Reranker(folder, max_length=np.int64(9)).max_length == 9


def test_prompts(plain, tmp_path) -> None:
    root = {"prompts": {"query": "q: ", "document": "d: ", "x": "x: "}, "default_prompt_name": "x"}
    ours, bare = rk.Reranker(save(plain, tmp_path / "a", root=root)), rk.Reranker(plain)
    assert ours.encode(["a"]).tobytes() == bare.encode(["x: a"]).tobytes()
    assert ours.encode(["a"], prompt_name="query").tobytes() == bare.encode(["q: a"]).tobytes()
    assert ours.score([("a", "b")]).logit.tobytes() == bare.score([("q: a", "d: b")]).logit.tobytes()
    assert [hit.document for hit in ours.rank("a", ["b"])] == ["b"], "documents are what was given"
    with pytest.raises(ValueError, match="encode: prompt_name must be one of None, 'query', 'document', 'x', got 'y'"):
        ours.encode(["a"], prompt_name="y")


def test_dot_similarity(plain, tmp_path) -> None:
    folder = save(plain, tmp_path / "a", normalise=False, root={"similarity_fn_name": "dot"})
    ours = rk.Reranker(folder)
    vectors = ours.encode(["a b", "c"])
    assert abs(np.linalg.norm(vectors[0]) - 1) > 0.1
    found = ours.score([("a b", "c")])
    assert abs(found.logit[0] - vectors.astype(np.float64).prod(0).sum()) < 1e-4
    assert found.complement[0] == np.float32(1) - found.logit[0]


def test_what_the_folder_is(plain, cross, tmp_path) -> None:
    """modules.json stands before the class that config.json names; what the user says stands before both."""
    sentences = save(plain, tmp_path / "a")
    config = json.loads((sentences / "config.json").read_text())
    write(sentences / "config.json", {**config, "architectures": ["BertForSequenceClassification"]})
    assert rk.Reranker(sentences).kind == "embedding"
    both = tmp_path / "b"
    shutil.copytree(cross, both)
    write(both / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": OLD + "Transformer"}])
    write(both / "config_sentence_transformers.json", {"model_type": "CrossEncoder", "prompts": {}})
    write(both / "sentence_bert_config.json", {"transformer_task": "sequence-classification", "max_seq_length": 16})
    ours = rk.Reranker(both)
    assert (ours.kind, ours.max_length) == ("cross-encoder", 16)
    # as another kind, a folder keeps none of these settings
    assert rk.Reranker(both, kind="embedding").max_length == models.POSITIONS - 10


def test_a_decoder_without_modules_gives_its_last_token(tmp_path) -> None:
    """As in sentence-transformers, whose default it is for a class that ends in ForCausalLM, and for no other."""
    own = models.tokenizer("roberta")
    for cls, want in (("ForCausalLM", "lasttoken"), ("Model", "mean")):
        models.decoder("qwen3", cls=cls, vocab_size=len(own), pad_token_id=own.pad_token_id).save_pretrained(tmp_path / cls)
        own.save_pretrained(tmp_path / cls)
        ours = rk.Reranker(tmp_path / cls, kind="embedding")
        assert ours.pooling == want
        st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
        theirs = st.SentenceTransformer(str(tmp_path / cls), device="cpu").encode(TEXTS, normalize_embeddings=True)
        near(ours.encode(TEXTS), theirs, cls)


REFUSED: list[tuple[dict[str, Any], str]] = [
    (dict(pooling="mean_sqrt_len_tokens"), "1_Pooling's pooling mode must be cls or .*, got mean_sqrt_len_tokens"),
    (dict(pooling={"pooling_mode": ["mean", "cls"]}), "got mean . cls"),
    (dict(pooling={"pooling_mode": 5}), "pooling mode must be cls or .*, got 5"),
    (dict(pooling={"pooling_mode_mean_tokens": False}), "pooling mode must be cls or .*, got none"),
    (dict(pooling={"include_prompt": False}), "1_Pooling's include_prompt must be true"),
    (dict(pooling={"pooling_mode": "mean", "new": 1}), "1_Pooling's config.json must be of keys that are known, got 'new'"),
    (
        dict(transformer={"max_seq_length": -5}),
        "sentence_bert_config.json's max_seq_length must be an integer from 3 on.*got -5",
    ),
    (dict(transformer={"max_seq_length": "x"}), "max_seq_length must be an integer from 3 on.*got 'x'"),
    (dict(transformer={"max_seq_length": 2}), "max_seq_length must be an integer from 3 on.*got 2"),
    (dict(transformer={"max_seq_length": 12.5}), "max_seq_length must be an integer from 3 on.*got 12.5"),
    (dict(transformer={"max_seq_length": True}), "max_seq_length must be an integer from 3 on.*got True"),
    (dict(model_max_length=2), "the tokenizer's model_max_length must be an integer from 3 on.*got 2"),
    (dict(model_max_length=-1), "tokenizer_config.json's model_max_length must be a number from 1 on, got -1"),
    (dict(transformer={"do_lower_case": "yes"}), "do_lower_case must be true or false, got 'yes'"),
    (dict(transformer={"tokenizer_name_or_path": "/x"}), "tokenizer_name_or_path must be unset, got '/x'"),
    (dict(transformer={"model_args": {"attn_implementation": "a/b"}}), "model_args must be empty.*got {'attn_impl"),
    (dict(transformer={"tokenizer_args": "x"}), "tokenizer_args must be empty.*got 'x'"),
    (dict(transformer={"query_length": 32}), "query_length must be unset, got 32"),
    (dict(transformer={"processing_kwargs": {"text": {"max_length": 4}}}), "processing_kwargs must be unset"),
    (dict(transformer={"transformer_task": "fill-mask"}), "transformer_task must be feature-extraction, got 'fill-mask'"),
    (dict(transformer={"module_output_name": "x"}), "module_output_name must be token_embeddings, got 'x'"),
    (dict(transformer={"modality_config": {"image": {}}}), "modality_config must be of text alone"),
    (dict(transformer={"surprise": 1}), "sentence_bert_config.json must be of keys that are known, got 'surprise'"),
    (dict(root={"similarity_fn_name": "euclidean"}), "similarity_fn_name must be cosine or dot, got 'euclidean'"),
    (dict(root={"similarity_fn_name": ["dot"]}), "similarity_fn_name must be cosine or dot"),
    (dict(root={"default_prompt_name": "a"}), "default_prompt_name must be one of its prompts, query, document, got 'a'"),
    (dict(root={"prompts": {"a": 1}}), "prompts must be an object of texts, got {'a': 1}"),
    (dict(root={"prompts": "a"}), "prompts must be an object of texts, got 'a'"),
    (dict(root={"model_type": "SparseEncoder"}), "model_type must be CrossEncoder or SentenceTransformer, got 'SparseEncoder'"),
    (dict(root={"requirements": {"transformers": "<1"}}), "transformers, which .* requires, must be '<1', got "),
]


@pytest.mark.parametrize(("options", "said"), REFUSED, ids=[said[:40] for _, said in REFUSED])
def test_what_is_not_served_is_refused_by_name(plain, tmp_path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rk.Reranker(save(plain, tmp_path / "m", **options))


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([], "modules.json must be Transformer, Pooling and perhaps Normalize, got none"),
        ([5], "modules.json: module 0 must be an object with a type, got 5"),
        ([{"path": ""}], "modules.json: module 0 must be an object with a type, got {'path': ''}"),
        ([{"type": 5}], "module 0 must be an object with a type"),
        ([{"type": "evil.Transformer", "path": ""}], "module 0's type must be a class of sentence_transformers, got 'evil.Tra"),
        (["Transformer", "Dense"], "modules.json must be Transformer, Pooling and .*, got Transformer, Dense"),
        (["Router", "Pooling"], "got Router, Pooling"),
        (["Transformer", "Normalize", "Pooling"], "got Transformer, Normalize, Pooling"),
        (["Transformer", "Pooling", "Normalize", "Normalize"], "got Transformer, Pooling, Normalize, Normalize"),
        (["Transformer"], "got Transformer alone"),
        ([{"type": OLD + "Transformer", "path": "../x"}], "module 0's path must be a path inside the folder, got '../x'"),
        ([{"type": OLD + "Transformer", "path": "/etc"}], "module 0's path must be a path inside the folder, got '/etc'"),
        ([{"type": OLD + "Transformer", "path": "C:\\x"}], "module 0's path must be a path inside the folder"),
        ([{"type": OLD + "Transformer", "path": "a\\..\\..\\x"}], "module 0's path must be a path inside the folder"),
        ([{"type": OLD + "Transformer", "path": 5}], "module 0's path must be a path inside the folder, got 5"),
        ([{"type": OLD + "Transformer", "path": "a\0b"}], "module 0's path must name a folder that is there"),
        ([{"type": OLD + "Transformer", "path": "no"}], "module 0's path must name a folder that is there, got 'no'"),
        ([{"type": OLD + "Transformer", "path": "", "kwargs": ["task"]}], r"module 0's kwargs must be unset.*got \['task'\]"),
        (
            [{"type": OLD + "Transformer", "name": "a", "path": ""}, {"type": OLD + "Pooling", "name": "a", "path": ""}],
            "module 1's name must be a name of its own, for a later module replaces the first, got 'a'",
        ),
    ],
)
def test_modules_that_are_not_served(plain, tmp_path, entries: list[Any], said: str) -> None:
    folder = save(plain, tmp_path / "m")
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "", "Dense": "", "Router": ""}
    made = [{"type": OLD + e, "path": paths[e], "name": str(i)} if isinstance(e, str) else e for i, e in enumerate(entries)]
    write(folder / "modules.json", made)
    with pytest.raises(ValueError, match=said):
        rk.Reranker(folder)


@pytest.mark.parametrize(
    ("config", "root", "said"),
    [
        (
            {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh"}},
            {},
            "activation_fn must be torch.nn.Sig",
        ),
        ({"sentence_transformers": {"activation_fn": "evil.Sigmoid"}}, {}, "got 'evil.Sigmoid'"),
        ({"sentence_transformers": {"activation_fn": 5}}, {}, "got 5"),
        (
            {"sentence_transformers": {"max_length": 3}},
            {},
            "sentence_transformers.max_length must be an integer from 5 on.*got 3",
        ),
        ({"sbert_ce_default_activation_function": "torch.nn.ReLU"}, {}, "sbert_ce_default_activation_function must be"),
        (
            {},
            {"activation_fn": "torch.nn.modules.activation.Softmax"},
            "config_sentence_transformers.json's activation_fn must be",
        ),
        ({}, {"keep_in_fp32_modules": ["0.model.classifier"]}, "keep_in_fp32_modules must be unset"),
        (
            {},
            {"prompts": {"q": "query: "}, "default_prompt_name": "q"},
            "default_prompt_name must be unset for a cross-encoder",
        ),
    ],
)
def test_settings_of_a_cross_encoder(cross, tmp_path, config: dict[str, Any], root: dict[str, Any], said: str) -> None:
    folder = tmp_path / "m"
    shutil.copytree(cross, folder)
    write(folder / "config.json", {**json.loads((folder / "config.json").read_text()), **config})
    if root:
        write(folder / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": OLD + "Transformer"}])
        write(folder / "config_sentence_transformers.json", {"model_type": "CrossEncoder", **root})
    with pytest.raises(ValueError, match=said):
        rk.Reranker(folder)


def test_every_key_that_sentence_transformers_reads_is_known() -> None:
    """A new version with a new key fails here, and not in silence."""
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules", reason="before version 5.4")
    base = pytest.importorskip("sentence_transformers.base.modules.transformer")
    import inspect

    named = inspect.signature(base.Transformer.__init__).parameters
    read = {name for name in named if name not in ("self", "model_name_or_path", "backend")}
    source = inspect.getsource(settings._of_transformer)
    assert read - set(settings.LOADERS) <= {name for name in read if f'"{name}"' in source}
    pooled = set(inspect.signature(modules.Pooling.__init__).parameters) - {"self", "args", "kwargs"}
    assert pooled <= {"embedding_dimension", "pooling_mode", "include_prompt"}
