"""Folders that somebody else wrote: no code of theirs runs, nothing outside is read, and what is no model is one line, soon."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
import rerank_kernels as rk
from commands import bad, environment, run, write
from rerank_kernels.scoring import files, folders, tokenising

SECONDS = 3.0  # for a refusal, with what it loads; a second on a machine that does nothing else


@pytest.fixture(scope="module")
def cross(tmp_path_factory) -> Path:
    return models.save_cross_encoder(tmp_path_factory.mktemp("cross"))


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("lines") / "docs.txt", "Paris is a city.", "Bread is made of flour.")


@pytest.fixture
def folder(cross, tmp_path) -> Path:
    return Path(shutil.copytree(cross, tmp_path / "m"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def refused(path: Path) -> str:
    started = time.perf_counter()
    with pytest.raises((ValueError, rk.PatchError)) as said:
        rk.Reranker(path)
    assert time.perf_counter() - started < SECONDS
    assert len(str(said.value)) < 1200
    return str(said.value)


# ---- no code of the folder runs ----------------------------------------------------------------------------------------------

EVIL = """
import pathlib
pathlib.Path({!r}).write_text("ran")
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
class EvilConfig(PreTrainedConfig):
    model_type = "evil"
class EvilModel(PreTrainedModel):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def evil(folder) -> tuple[Path, Path]:
    """A folder with code, and the file that exists when it ran."""
    ran = folder.parent / "ran"
    (folder / "evil.py").write_text(EVIL.format(str(ran)))
    return folder, ran


def remote(folder: Path, *, model_type: str | None = "evil", config: bool = True, tokenizer: bool = False) -> None:
    names = ("AutoModel", "AutoModelForSequenceClassification")
    code = {"AutoConfig": "evil.EvilConfig", **dict.fromkeys(names, "evil.EvilModel")}
    if config:
        change(folder / "config.json", auto_map=code, model_type=model_type)
    if tokenizer:
        code = {"AutoTokenizer": [None, "evil.EvilTokenizer"]}
        change(folder / "tokenizer_config.json", auto_map=code, tokenizer_class="EvilTokenizer")


CASES: dict[str, Callable[[Path], None]] = {
    "unknown type": remote,
    "known type": lambda f: remote(f, model_type="xlm-roberta"),
    "no type": lambda f: remote(f, model_type=None),
    "tokenizer": lambda f: remote(f, config=False, tokenizer=True),
    "both": lambda f: remote(f, tokenizer=True),
    "sentence-transformers": lambda f: (f / "modules.json").write_text(json.dumps([{"path": "", "type": "evil.Transformer"}])),
    "an activation": lambda f: change(f / "config.json", sentence_transformers={"activation_fn": "evil.EvilModel"}),
    "its own attention": lambda f: change(f / "config.json", attn_implementation="org/kernel", _attn_implementation="a/b"),
}


@pytest.mark.parametrize("name", CASES)
def test_no_code_of_a_folder_runs(evil, lines, capsys, monkeypatch, name: str) -> None:
    folder, ran = evil
    CASES[name](folder)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    if name in ("known type", "its own attention", "tokenizer"):  # transformers has classes of its own for these
        assert run(capsys, "rank", folder, "--query", "q", lines)[0] == 0
        assert rk.Reranker(folder).model.config._attn_implementation == "sdpa"
    else:
        said = bad(capsys, "rank", folder, "--query", "q", lines)
        assert "evil" in said or "model_type must be the name" in said, said
    assert not ran.exists()


def test_who_says_so_runs_it(evil, capsys, lines) -> None:
    """The test above would see it: the same folder runs its code when its user says so, and is then refused as a model."""
    folder, ran = evil
    remote(folder)
    said = bad(capsys, "rank", folder, "--query", "q", lines)
    assert "its own code (auto_map) runs with trust_remote_code=True alone" in said and not ran.exists()
    with pytest.raises((ValueError, rk.PatchError)):
        rk.Reranker(folder, trust_remote_code=True)
    assert ran.exists()
    ran.unlink()
    for command in (["rank", "--query", "q"], ["verify", "--pairs"]):
        name, *options = command
        run(capsys, name, folder, "--trust-remote-code", *options, lines)
    with pytest.raises(ValueError, match="trust_remote_code must be one of False, True, got 'yes'"):
        rk.Reranker(folder, trust_remote_code="yes")


def test_every_load_says_that_no_code_may_run() -> None:
    """transformers asks on stdin where this is left out."""
    import ast

    calls = 0
    for file in Path(rk.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                calls += 1
                names = {word.arg for word in node.keywords}
                assert "trust_remote_code" in names or None in names, f"{file}:{node.lineno}"
    assert calls == 5


# ---- nothing outside the folder is read --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_link_out_of_the_folder(folder, name: str) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (folder / name).rename(outside / name)
    (folder / name).symlink_to(outside / name)
    said = refused(folder)
    assert f"a readable {name}; it is a link out of the folder, to " in said and "cp -rL" in said
    copied = folder.parent / "copied"
    subprocess.run(["cp", "-rL", folder, copied], check=True)  # the advice
    assert rk.Reranker(copied).score([("a", "b")]).logit.shape == (1,)


def test_links_inside_and_those_of_hugging_faces_cache(folder, cross) -> None:
    want = rk.Reranker(cross).score([("a", "b")]).logit.tobytes()
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    assert rk.Reranker(folder).score([("a", "b")]).logit.tobytes() == want
    cache = folder.parent / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(cross.iterdir()):
        shutil.copy(file, cache / "blobs" / f"{i:040}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i:040}")
    assert rk.Reranker(snapshot).score([("a", "b")]).logit.tobytes() == want
    linked = folder.parent / "linked"
    linked.symlink_to(snapshot)
    assert rk.Reranker(linked).score([("a", "b")]).logit.tobytes() == want
    secret = cache / "secret.json"
    secret.write_text("{}")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(secret)
    assert "it is a link out of the folder" in refused(snapshot)


def test_links_in_a_circle_and_to_nothing(folder) -> None:
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").symlink_to("tokenizer_config.json")
    assert "a readable tokenizer_config.json; " in refused(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").symlink_to("nothing")
    assert "a readable tokenizer_config.json; No such file or directory" in refused(folder)


@pytest.mark.parametrize("shard", ["../m2/model.safetensors", "/etc/hostname", "sub/x.safetensors", "no.safetensors", 5])
def test_an_index_names_files_beside_it(folder, cross, shard: Any) -> None:
    shutil.copytree(cross, folder.parent / "m2")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": shard}}))
    assert f"its weight_map must name files beside it, got {str(shard)!r}" in refused(folder)


def test_an_index_of_files_beside_it_is_served(folder, cross) -> None:
    (folder / "model.safetensors").unlink()
    rk.unpatch(model := rk.Reranker(cross).model)
    model.save_pretrained(folder, max_shard_size="100KB")
    assert (folder / "model.safetensors.index.json").exists()
    assert rk.Reranker(folder).score([("a", "b")]).logit.tobytes() == rk.Reranker(cross).score([("a", "b")]).logit.tobytes()


@pytest.mark.parametrize("key", ["vocab_file", "merges_file", "spm_file", "tokenizer_file", "special_tokens_map_file"])
def test_paths_of_tokenizer_config(folder, cross, key: str) -> None:
    """Such paths are often of the machine of the folder's author: what the folder itself has is read in their place."""
    elsewhere = models.save_cross_encoder(folder.parent / "elsewhere", "bert")
    change(folder / "tokenizer_config.json", **{key: str(elsewhere / "tokenizer.json")})
    if key in ("tokenizer_file", "special_tokens_map_file"):
        assert rk.Reranker(folder).score([("a", "b")]).logit.tobytes() == rk.Reranker(cross).score([("a", "b")]).logit.tobytes()
    else:
        assert f"tokenizer_config.json's {key} must be a file of the folder, got '/" in refused(folder)


# ---- what is no model is one line, soon --------------------------------------------------------------------------------------

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "config.json; it must hold an object, got []"),
        ("5", "config.json; it must hold an object, got 5"),
        ('"x"', "config.json; it must hold an object, got 'x'"),
        ("null", "config.json; it must hold an object, got None"),
        ("", "config.json; Expecting value"),
        (DEEP, "config.json; it is nested too deeply"),
        ('{"a":' * 100_000, "config.json; it is nested too deeply"),
        (b"\xef\xbb\xbf{}", "config.json; "),
        (b'{"a": "\xff"}', "config.json; it is not UTF-8: invalid start byte at byte 7"),
        ('{"a": 1', "config.json; "),
        ("1" * 10_000, "config.json; "),
        ("{}", "config.json's model_type must be the name of a model type, got None; served are albert, bert"),
        ('{"model_type": "mpnet"}', "model_type must be one that is served, albert, bert, "),
        ('{"model_type": ["bert"]}', "model_type must be the name of a model type, got ['bert']"),
        ('{"model_type": "bert", "architectures": 5}', "must describe the weights beside it"),
    ],
)
def test_config_json_of_another_kind(folder, capsys, lines, content: str | bytes, said: str) -> None:
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in refused(folder)
    assert said in bad(capsys, "rank", folder, "--query", "q", lines)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "special_tokens_map.json", "modules.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "big", "deep", "list"])
def test_files_of_another_kind(folder, name: str, kind: str) -> None:
    place = folder / name
    place.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    elif kind == "socket":
        import socket

        os.chdir(folder)
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(name)
        os.chdir("/")
    elif kind == "big":
        with open(place, "wb") as file:
            file.truncate(1 << 34)  # sparse: takes no disk
    else:
        place.write_text(DEEP if kind == "deep" else '{"a": 5}' if name == "modules.json" else "[5]")
    said = {
        "pipe": "a named pipe",
        "folder": "a folder",
        "socket": "a socket",
        "big": "bytes",
        "deep": "nested",
        "list": "hold",
    }
    assert said[kind] in (found := refused(folder)) and name in found


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_hidden_layers": 10**9}, "must describe the weights .*, got hidden_size 64, num_hidden_layers 1,000,000,000"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers must be an integer from 1 on"),
        ({"num_hidden_layers": 3}, "must hold every parameter|must describe the weights"),
        ({"hidden_size": 1 << 20, "num_attention_heads": 4}, "must describe the weights beside it"),
        ({"vocab_size": 2**31 - 1}, "must describe the weights beside it"),
        ({"max_position_embeddings": 2**31 - 1}, "must describe the weights beside it"),
        ({"type_vocab_size": 2**31 - 1}, "must describe the weights beside it"),
        ({"intermediate_size": 2**31 - 1}, "must describe the weights beside it"),
        ({"hidden_size": "64"}, "hidden_size must be an integer from 1 on, got '64'"),
        ({"hidden_size": -64}, "hidden_size must be an integer from 1 on, got -64"),
        ({"hidden_size": 64.0}, "hidden_size must be an integer from 1 on, got 64.0"),
        ({"hidden_size": True}, "hidden_size must be an integer from 1 on, got True"),
        ({"hidden_size": None}, "hidden_size must be an integer from 1 on, got None"),
        ({"num_attention_heads": 0}, "num_attention_heads must be an integer from 1 on, got 0"),
        ({"num_attention_heads": 5}, "num_attention_heads must be a divisor of hidden_size 64, got 5"),
        ({"num_labels": 10**9}, "num_labels must be 1 to 65,536 labels, got 1000000000"),
        ({"num_labels": "x"}, "num_labels must be 1 to 65,536 labels, got 'x'"),
        ({"id2label": 5.5}, "id2label must be 1 to 65,536 labels, got 5.5"),
        ({"hidden_act": "evil"}, "hidden_act must be the name of an activation of transformers, got 'evil'"),
        ({"hidden_act": ["gelu"]}, "hidden_act must be the name of an activation"),
        ({"intermediate_size": 95}, r"must hold .* of shape \[\d+(, \d+)?\], as config.json says, got \[\d+"),
        ({"vocab_size": 100}, r"must hold .*word_embeddings.weight of shape \[100, 64\], as config.json says, got"),
        ({"pad_token_id": 10**6}, "no model could be loaded"),
        ({"layer_norm_eps": "x"}, "no model could be loaded|layer_norm_eps"),
        ({"dtype": "float99", "torch_dtype": "float99"}, "no model could be loaded"),
        ({"quantization_config": {"quant_method": "x"}}, "quantization_config must be unset"),
        ({"transformers_weights": "../m/model.safetensors"}, "transformers_weights must be unset"),
        ({"is_decoder": True}, "is_decoder"),
    ],
)
def test_values_of_config_json(folder, values: dict[str, Any], said: str) -> None:
    import re

    change(folder / "config.json", **values)
    assert re.search(said, found := refused(folder)), found


@pytest.mark.parametrize("kind", (*models.FAMILIES, *models.DECODERS))
def test_sizes_of_every_model_type(tmp_path, kind: str) -> None:
    """What is compared with the weights fits them, also where config.json leaves a size out; what is too much does not."""
    if kind in models.FAMILIES:
        folder = models.save_cross_encoder(tmp_path, kind)
    else:
        own, folder = models.tokenizer("roberta"), tmp_path
        sizes = dict(vocab_size=len(own), pad_token_id=own.pad_token_id, num_labels=1)
        models.decoder(kind, cls="ForSequenceClassification", **sizes).save_pretrained(folder)
        own.save_pretrained(folder)
    want = rk.Reranker(folder).score([("a", "b")]).logit
    assert np.isfinite(want).all()
    before = json.loads((folder / "config.json").read_text())
    if kind in ("llama", "mistral"):  # where null is hidden_size / heads
        change(folder / "config.json", head_dim=None)
        assert rk.Reranker(folder).score([("a", "b")]).logit.tobytes() == want.tobytes()
    names = folders.NAMES.get(kind, {})
    for key in ("num_hidden_groups" if kind == "albert" else "num_hidden_layers", "vocab_size", "intermediate_size"):
        for name in {key, names.get(key, key)}:
            change(folder / "config.json", **{name: 10**9})
            assert f"{key} 1,000,000,000" in refused(folder)
            (folder / "config.json").write_text(json.dumps(before))
    assert rk.Reranker(folder).score([("a", "b")]).logit.tobytes() == want.tobytes()


def test_sizes_that_weights_do_not_tell(tmp_path) -> None:
    """ALBERT's layers share weights; DistilBERT's sizes have two names each, and its positions a table without types."""
    folder = models.save_cross_encoder(tmp_path / "albert", "albert")
    change(folder / "config.json", num_hidden_layers=10**9)
    assert "num_hidden_layers must be at most 4,096, got 1000000000" in refused(folder)
    change(folder / "config.json", num_hidden_layers=4096)
    assert rk.Reranker(folder).max_length > 0
    folder = models.save_cross_encoder(tmp_path / "distilbert", "distilbert")
    before = json.loads((folder / "config.json").read_text())
    for values, said in {
        ("dim", 10**30): "dim must be an integer from 1 on",
        ("n_layers", "2"): "n_layers must be an integer from 1 on, got '2'",
        ("n_heads", 5): "num_attention_heads must be a divisor of hidden_size 64",
        ("activation", "evil"): "activation must be the name of an activation of transformers, got 'evil'",
        ("max_position_embeddings", 2**31 - 1): "must describe the weights beside it",
    }.items():
        change(folder / "config.json", **dict([values]))
        assert said in refused(folder)
        (folder / "config.json").write_text(json.dumps(before))
    assert rk.Reranker(folder).max_length > 0


def test_an_adapter_beside_a_model(folder) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    assert "it holds an adapter (adapter_config.json); load it with peft" in refused(folder)


def _header(tensors: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "its header would have 0 bytes"),
        (b"\xff" * 64, "its header would have 18,446,744,073,709,551,615 bytes, and the file has 64"),
        (_header({})[:-1], "its header would have 2 bytes, and the file has 9"),
        (_header({"a": 5}), "its header is none of safetensors"),
        (_header({"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 0]}}), "invalid literal"),
        (
            _header({"a": {"dtype": "F32", "shape": [2**62] * 2, "data_offsets": [0, 4]}}, b"1234"),
            "no model could be loaded|must",
        ),
        (_header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"1234"), "its tensors end at byte "),
        (struct.pack("<Q", 9) + b"[[[[[[[[[", "model.safetensors: "),
        (struct.pack("<Q", 100_000) + DEEP.encode(), "its header is none of safetensors|maximum recursion"),
    ],
)
def test_weights_that_are_none(folder, content: bytes, said: str) -> None:
    import re

    (folder / "model.safetensors").write_bytes(content)
    assert re.search(said, found := refused(folder)) and "model.safetensors" in found + "model.safetensors", found


def test_weights_that_end_early(folder) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 9, 8):
        (folder / "model.safetensors").write_bytes(whole[:length])
        assert "no model could be loaded from" in (found := refused(folder)) and "model.safetensors" in found


def test_pickled_weights_run_nothing(folder) -> None:
    ran = folder.parent / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return Path(ran).write_text, ("ran",)

    (folder / "model.safetensors").unlink()
    torch.save({"a": Evil(), "b": torch.zeros(10**6)}, folder / "pytorch_model.bin")
    assert "no model could be loaded from" in refused(folder)
    assert not ran.exists()


def test_weights_that_are_not_finite_are_served(folder) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["classifier.out_proj.bias"][:] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert np.isnan(rk.Reranker(folder).score([("a", "b")]).logit).all()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "no tokenizer could be loaded"),
        (DEEP, "no tokenizer could be loaded"),
        ('{"version": "1.0"}', "no tokenizer could be loaded"),
        ("", "no tokenizer could be loaded"),
        (b"\xff\xfe", "no tokenizer could be loaded"),
    ],
)
def test_tokenizers_that_are_none(folder, content: str | bytes, said: str) -> None:
    (folder / "tokenizer.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in refused(folder)


@pytest.mark.parametrize("pattern", ["(", "(a|a|aa)+$", "\\p{Nonsense}", "a{99999999}"])
def test_regular_expressions_of_a_tokenizer(folder, tmp_path, pattern: str) -> None:
    """Whether it fails when it is read or panics at a text: exit code 2 and one line, of which Rust prints nothing."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    own = json.loads((folder / "tokenizer.json").read_text())
    own["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, own["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(own))
    docs = write(tmp_path / "docs.txt", "a" * 5_000 + "b")
    if not pattern.endswith("$"):
        assert str(folder) in refused(folder)
        return
    with pytest.raises(ValueError, match=f"the tokenizer of {folder} cannot read these texts: .*retry-limit"):
        rk.Reranker(folder).score([("q", "a" * 5_000 + "b")])
    command = [sys.executable, "-m", "rerank_kernels", "rank", folder, "--query", "q", docs]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert (ran.returncode, ran.stdout) == (2, "") and ran.stderr.count("\n") == 1, ran.stderr
    assert ran.stderr.startswith(f"rerank-kernels: Reranker: the tokenizer of {folder} cannot read these texts: ")


def test_a_tokenizer_of_another_model(folder) -> None:
    own = models.tokenizer("xlm-roberta")
    own.add_tokens([f"new{i}" for i in range(50)])
    own.save_pretrained(folder)
    reranker = rk.Reranker(folder)
    assert np.isfinite(reranker.score([("a", "b")]).logit).all()
    with pytest.raises(
        ValueError, match=r"ids of the tokenizer must be below \d+, config.json's vocab_size, got \d+ in text 0"
    ):
        reranker.score([("new7", "b")])


def test_ids_beyond_the_vocabulary_are_one_line(folder, capsys, tmp_path) -> None:
    own = models.tokenizer("xlm-roberta")
    own.add_tokens(["new"])
    own.save_pretrained(folder)
    said = bad(capsys, "rank", folder, "--query", "q", write(tmp_path / "docs.txt", "a new text"))
    assert said.startswith("Reranker: ids of the tokenizer must be below ")


def test_the_memory_of_a_refusal_is_bounded(folder) -> None:
    """With 10^9 layers or a width of a million, in a process that may have 4 GB."""
    change(folder / "config.json", num_hidden_layers=10**9, hidden_size=1 << 20, num_attention_heads=4)
    program = f"""
import resource, sys
import rerank_kernels as rk
from rerank_kernels.scoring import reranker
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), used + (2 << 30)))
try:
    rk.Reranker({str(folder)!r})
except ValueError as error:
    assert "must describe the weights beside it" in str(error), error
    print("refused")
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("no /proc")
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert ran.stdout == "refused\n", ran.stderr[-800:]


# ---- the tests above would see it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "name", "wrong", "test", "value"),
    [
        (files.Folder, "_inside", lambda self, name: self.path / name, test_a_link_out_of_the_folder, "config.json"),
        (files.Folder, "_inside", lambda self, name: self.path / name, test_a_link_out_of_the_folder, "tokenizer.json"),
        (folders, "FOREIGN", (), test_values_of_config_json, ({"quantization_config": {"quant_method": "x"}}, "must be unset")),
        (folders, "_held", lambda folder: 1 << 70, test_values_of_config_json, ({"intermediate_size": 10**5}, "must describe")),
        (folders, "_given", lambda folder: {}, test_paths_of_tokenizer_config, "spm_file"),
        (tokenising, "in_vocabulary", lambda *_: None, test_ids_beyond_the_vocabulary_are_one_line, None),
    ],
)
def test_the_tests_would_see_it(folder, cross, capsys, tmp_path, monkeypatch, place, name, wrong, test, value) -> None:
    monkeypatch.setattr(place, name, wrong)
    rest = {"values": value[0], "said": value[1]} if isinstance(value, tuple) else {"name": value, "key": value}
    given = {"folder": folder, "cross": cross, "capsys": capsys, "tmp_path": tmp_path, **rest}
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test(**{n: given[n] for n in inspect.signature(test).parameters})
