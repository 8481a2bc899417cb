"""Model folders as save_pretrained and sentence-transformers write them: loaded, or an error that names file and value.

A folder's own code does not run: transformers is told so at every load, and without the user's word a class that only such
code defines is an error. How attention is computed and where weights lie is not the folder's to say either. What config.json
asks for is compared with the weights before anything of its size is made.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from rerank_kernels import check
from rerank_kernels.errors import PatchError
from rerank_kernels.models import registry
from rerank_kernels.scoring.files import LARGEST, Folder
from rerank_kernels.scoring.settings import KINDS, writes

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)  # in this order
SIZES = "hidden_size num_hidden_layers num_attention_heads intermediate_size vocab_size max_position_embeddings type_vocab_size"
SIZES += " embedding_size num_key_value_heads head_dim"
MAY_BE_NULL = ("num_key_value_heads", "head_dim")  # then they follow from the others
LABELS = 1 << 16
FOREIGN = ("quantization_config", "transformers_weights", "compression_config")
ALWAYS_FOUND = ("tokenizer_file", "tokenizer_config_file", "special_tokens_map_file", "added_tokens_file", "chat_template_file")


def load_model(folder: Folder, kind: str, trust: bool = False) -> Any:
    """The model in `folder`, of that kind, not patched. trust: the folder's own code may run."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    folder.check()
    raw = folder.json("config.json")
    _config(folder, raw, kind, trust)
    auto: Any = AutoModelForSequenceClassification if kind == KINDS[0] else AutoModel
    if kind == KINDS[0] and writes(raw.get("architectures")):
        auto = AutoModelForCausalLM
    own = {"local_files_only": True, "trust_remote_code": trust}
    with _named(f"no model could be loaded from {folder.path}"), _no_bar():
        config: Any = AutoConfig.from_pretrained(folder.path, **own)
        # transformers' own choice, whatever the folder says: a name may mean a download. Where FlashAttention is installed,
        # that of transformers 4 for ModernBERT has angles of its own.
        config._attn_implementation = "sdpa" if config.model_type == "modernbert" else None
        model, info = auto.from_pretrained(
            folder.path, config=config, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True, **own
        )
    wrong = sorted(info.get("mismatched_keys") or ())
    if wrong:
        key, came, wanted = wrong[0]
        shapes = f"{key} of shape {list(wanted)}, as config.json says"
        raise ValueError(
            f"Reranker: the weights in {folder.path} must hold {shapes}, got {list(came)}; {len(wrong)} do not fit"
        )
    # transformers fills missing weights with random numbers and goes on; the pooler is not read for embeddings
    missing = sorted(k for k in info["missing_keys"] if kind == KINDS[0] or not k.startswith("pooler."))
    if missing:
        raise ValueError(
            f"Reranker: the weights in {folder.path} must hold every parameter of a {kind}; {len(missing)} are missing: "
            + ", ".join(missing[:4])
        )
    return model


def load_tokenizer(folder: Folder, trust: bool = False, lower: bool = False) -> Any:
    """The tokenizer in `folder`. lower: it makes letters small first, as sentence-transformers' do_lower_case does."""
    from transformers import AutoTokenizer

    folder.check()
    given = _given(folder)
    with _named(f"no tokenizer could be loaded from {folder.path}"):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder.path, local_files_only=True, trust_remote_code=trust, **given)
    # without its files transformers 5 makes an empty tokenizer, for which all texts are alike
    names = sorted({"tokenizer.json", *tokenizer.vocab_files_names.values()})
    if not any(folder.has(name) for name in names):
        raise ValueError(f"Reranker: no tokenizer could be loaded from {folder.path}: it holds none of {', '.join(names)}")
    if lower:
        _lower(tokenizer)
    return tokenizer


# ---- what config.json says --------------------------------------------------------------------------------------------------


def _config(folder: Folder, config: dict[str, Any], kind: str, trust: bool) -> None:
    """Refuses what cannot be served, and what would take time or memory to find out."""

    def fail(key: str, wanted: str, hint: str = "") -> NoReturn:
        check.fail("Reranker", f"{folder.path}/config.json's {key}", wanted, f"{config.get(key)!r:.60}", hint)

    for key in FOREIGN:
        if config.get(key):
            fail(key, "unset", "save the model with weights in float32, float16 or bfloat16")
    if folder.has("adapter_config.json"):
        folder.refuse("config.json", "it holds an adapter (adapter_config.json); load it with peft, and merge_and_unload() it")
    served = registry.model_types()
    kind_of_model = config.get("model_type")
    if kind_of_model not in served:
        if trust and isinstance(config.get("auto_map"), dict):
            return
        if not isinstance(kind_of_model, str):
            fail("model_type", "the name of a model type", f"served are {', '.join(served)}")
        hint = "; its own code (auto_map) runs with trust_remote_code=True alone" if config.get("auto_map") else ""
        raise PatchError(
            f"Reranker: {folder.path}/config.json's model_type must be one that is served, {', '.join(served)}, "
            f"got {kind_of_model!r:.60}{hint}"
        )
    for key in ("num_labels", "id2label", "label2id"):
        value = config.get(key)
        count = _whole(value) if key == "num_labels" else len(value) if isinstance(value, dict) else -1
        if value is not None and not 0 < count <= LABELS:
            fail(key, f"1 to {LABELS:,} labels")
    for key in SIZES.split():
        if key in config and not 0 < _whole(config[key]) < 1 << 31 and not (config[key] is None and key in MAY_BE_NULL):
            fail(key, "an integer from 1 on")
    from transformers import AutoConfig
    from transformers.activations import ACT2FN

    act = config.get("hidden_act")
    if act is not None and (not isinstance(act, str) or act not in ACT2FN):
        fail("hidden_act", "the name of an activation of transformers")
    usual: Any = AutoConfig.for_model(kind_of_model)  # for what it does not say
    size = {key: n for key in SIZES.split() if (n := config.get(key, getattr(usual, key, None))) is not None}
    wide, heads = size["hidden_size"], size["num_attention_heads"]
    if "head_dim" not in size and wide % heads:
        fail("num_attention_heads", f"a divisor of hidden_size {wide}")
    # at least: words; positions and types where there is a table of them; of a layer two products as wide as the heads, and two
    # of the feed-forward layer
    inputs = size["vocab_size"] + (
        size["max_position_embeddings"] + size["type_vocab_size"] if "type_vocab_size" in size else 0
    )
    inner = wide * heads * size.get("head_dim", wide // heads) + wide * size["intermediate_size"]
    wanted = inputs * size.get("embedding_size", wide) + 2 * size["num_hidden_layers"] * inner
    held = _held(folder)
    if wanted > held:
        said = ", ".join(f"{key} {value:,}" for key, value in size.items())
        raise ValueError(
            f"Reranker: {folder.path}/config.json must describe the weights beside it, got {said}: a model of {wanted:,} "
            f"numbers, and the files hold {held:,} at most"
        )


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else -1


def _held(folder: Folder) -> int:
    """At most so many numbers are in the files of weights: what safetensors' headers say, else a byte each."""
    name = next((name for name in WEIGHTS if folder.has(name)), None)
    if name is None:
        raise ValueError(f"Reranker: no model could be loaded from {folder.path}: it holds none of {', '.join(WEIGHTS)}")
    if not name.endswith(".json"):
        return _numbers(folder, name)
    index = folder.json(name).get("weight_map")
    if not isinstance(index, dict) or not index:
        folder.refuse(name, "it must hold a weight_map")
    for shard in dict.fromkeys(map(str, index.values())):
        if Path(shard).name != shard or not folder.has(shard):
            folder.refuse(name, f"its weight_map must name files beside it, got {shard!r:.80}")
    return sum(_numbers(folder, shard) for shard in dict.fromkeys(map(str, index.values())))


def _numbers(folder: Folder, name: str) -> int:
    place = folder.file(name)
    size = place.stat().st_size
    if not name.endswith(".safetensors"):
        return size
    total = 0
    try:
        with open(place, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, LARGEST):
                raise ValueError(f"its header would have {length:,} bytes, and the file has {size:,}")
            header = json.loads(file.read(length))
        ends = [tensor["data_offsets"][1] for key, tensor in header.items() if key != "__metadata__"]
        if 8 + length + max(ends, default=0) > size:
            raise ValueError(f"its tensors end at byte {8 + length + max(ends):,}, and the file has {size:,}")
        for key, tensor in header.items():
            if key != "__metadata__":
                total += math.prod(int(n) for n in tensor["shape"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError) as error:
        said = str(error) if isinstance(error, ValueError | OSError) else "its header is none of safetensors"
        raise ValueError(f"Reranker: no model could be loaded from {folder.path}: {name}: {said:.120}") from error
    return min(total, 8 * size)  # no number has less than a bit


# ---- what tokenizer_config.json says -----------------------------------------------------------------------------------------


def _given(folder: Folder) -> dict[str, Any]:
    """Arguments that stand before what tokenizer_config.json says: a path in it is often of its author's machine."""
    for name in ("special_tokens_map.json", "added_tokens.json"):
        if folder.has(name):
            folder.json(name)
    if not folder.has(name := "tokenizer_config.json"):
        return {}
    config = folder.json(name)
    for key, value in config.items():
        if value is None or key in ALWAYS_FOUND or not key.endswith(("_file", "_files", "_spm")):
            continue
        if not isinstance(value, str) or Path(value).name != value or not folder.has(value):
            check.fail("Reranker", f"{folder.path}/{name}'s {key}", "a file of the folder", f"{value!r:.80}")
    longest = config.get("model_max_length")
    if longest is not None and not (isinstance(longest, int | float) and not isinstance(longest, bool) and longest > 0):
        check.fail("Reranker", f"{folder.path}/{name}'s model_max_length", "a number from 1 on", f"{longest!r:.60}")
    said = config.get("tokenizer_file")
    return {"tokenizer_file": str(folder.file("tokenizer.json"))} if said and folder.has("tokenizer.json") else {}


def _lower(tokenizer: Any) -> None:
    from tokenizers.normalizers import Lowercase, Sequence

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        check.fail("Reranker", "do_lower_case", "false for a tokenizer without tokenizer.json", "true", "save a fast tokenizer")
    before = backend.normalizer
    steps: list[Any] = list(iter(before)) if isinstance(before, Sequence) else [] if before is None else [before]
    if not any(isinstance(step, Lowercase) for step in steps):
        backend.normalizer = Sequence([Lowercase(), *steps])


# ---- errors and bars of the loaders ------------------------------------------------------------------------------------------


@contextmanager
def _named(what: str) -> Iterator[None]:
    """The loaders raise whatever their file readers raise; Rust's panics are not even an Exception."""
    try:
        yield
    except Exception as error:
        said = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"Reranker: {what}: {' '.join(said.split()):.600}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"Reranker: {what}: {' '.join(str(error).split()):.600}") from error


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
