"""What can be verified with nothing at hand: shapes with random weights, and texts from Python's own library."""

from __future__ import annotations

import collections
import contextlib
import importlib
import inspect
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rerank_kernels.scoring import folders, settings
from rerank_kernels.scoring.files import Folder
from rerank_kernels.scoring.reranker import Reranker

SHAPE = "shape:"
WORDS = 8000  # of the tokenizer that goes with them
# Models that people run, by their config.json, and one that is small.
SHAPES: dict[str, dict[str, Any]] = {
    "bge-reranker-base": {"layers": 12, "hidden": 768, "heads": 12, "inner": 3072, "vocabulary": 250_002},
    "bge-reranker-large": {"layers": 24, "hidden": 1024, "heads": 16, "inner": 4096, "vocabulary": 250_002},
    "tiny": {"layers": 2, "hidden": 64, "heads": 4, "inner": 160, "vocabulary": WORDS},
}
# Other cross-encoders: the class's prefix and its config.
CROSS_ENCODERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gte-reranker-modernbert-base": ("ModernBert", {"vocab_size": 50_368, "classifier_pooling": "mean", "num_labels": 1}, ""),
}
# Decoders with a language head: the class's prefix, its config, and what is cut of the model that people run.
DECODERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen3-reranker-0.6b": (
        "Qwen3",
        {
            "vocab_size": 151_669, "hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "tie_word_embeddings": True,
            "max_position_embeddings": 40_960, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
        },
        "4 of its 28 layers",
    ),
    "relu-llama": (
        "Llama",
        {
            "vocab_size": WORDS, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
            "num_key_value_heads": 4, "intermediate_size": 1024, "hidden_act": "relu", "max_position_embeddings": 2048,
        },
        "",
    ),
}  # fmt: skip
SEED = 20_240_229


class Loaded(NamedTuple):
    model: Any  # not patched
    tokenizer: Any
    pooling: str  # of an embedding model
    note: str = ""  # what is not as its name says


def load(name: str, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Loaded:
    """A model folder, or "shape:NAME" for random weights (the same in every process). ValueError says what is wrong with it.

    A file NAME.gguf is a decoder that transformers unpacks; so is a folder that holds one, and no config.json.
    """
    if name.startswith(SHAPE):
        return _shape(name.removeprefix(SHAPE), dtype)
    path = Path(name)
    if (packed := gguf(path)) is not None:
        return _unpacked(packed, dtype)
    folder = settings.read(Folder(path), None).transformer
    if folder is not None and settings.writes(folder.json("config.json").get("architectures")):
        model = folders.load_model(folder, settings.KINDS[0], trust_remote_code)
        tokenizer = folders.load_tokenizer(folder, trust_remote_code)
        return Loaded(model.eval() if dtype is None else model.eval().to(dtype), tokenizer, "lasttoken")
    from rerank_kernels.patching.walk import unpatch

    found = Reranker(Path(name), dtype=dtype, trust_remote_code=trust_remote_code)
    unpatch(found.model)
    return Loaded(found.model, found.tokenizer, found.pooling)


def gguf(path: Path) -> Path | None:
    """The GGUF file that a path names, or that its folder holds in the place of config.json."""
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    held = sorted(path.glob("*.gguf"))
    if len(held) > 1:
        raise ValueError(f"{path} holds {len(held)} GGUF files, {', '.join(p.name for p in held[:4])}; name one of them")
    return held[0] if held else None


def _unpacked(file: Path, dtype: torch.dtype | None) -> Loaded:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": file.name, "local_files_only": True}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a bar that no setting of transformers turns off
            tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, **where)
            model: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=dtype or torch.float32, **where)
    except ImportError as error:
        said = str(error).split(".")[0]
        raise ValueError(f"{file}: {said}; pip install 'rerank-kernels[gguf]' brings gguf and accelerate") from None
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: no model could be unpacked: {' '.join(str(error).split()):.400}") from error
    return Loaded(model.eval(), tokenizer, "lasttoken")


def _shape(name: str, dtype: torch.dtype | None) -> Loaded:
    if name in DECODERS:
        return _named_shape(name, *DECODERS[name], "ForCausalLM", "lasttoken", dtype)
    if name in CROSS_ENCODERS:
        return _named_shape(name, *CROSS_ENCODERS[name], "ForSequenceClassification", "mean", dtype)
    if name not in SHAPES:
        raise ValueError(f"no shape is named {name!r}; there are {', '.join((*SHAPES, *CROSS_ENCODERS, *DECODERS))}")
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

    tokenizer = _word_tokenizer()
    shape = SHAPES[name]
    config: Any = XLMRobertaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        intermediate_size=shape["inner"],
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    config.num_labels = 1
    return Loaded(_drawn(XLMRobertaForSequenceClassification, config, dtype), tokenizer, "mean")


def _named_shape(
    name: str, prefix: str, sizes: dict[str, Any], cut: str, head: str, pooling: str, dtype: torch.dtype | None
) -> Loaded:
    import transformers

    note = f"shape:{name}: random weights{', ' + cut if cut else ''}"
    config = getattr(transformers, f"{prefix}Config")(**sizes, bos_token_id=0, pad_token_id=1, eos_token_id=2)
    return Loaded(_drawn(getattr(transformers, f"{prefix}{head}"), config, dtype), _word_tokenizer(), pooling, note)


def _drawn(cls: Any, config: Any, dtype: torch.dtype | None) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model: Any = cls(config)
    # By NumPy: PyTorch's normal numbers depend on the instruction set that it takes (ATEN_CPU_CAPABILITY).
    draw = np.random.default_rng(SEED)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.copy_(torch.from_numpy(draw.standard_normal(tuple(p.shape), dtype=np.float32) * np.float32(0.02)))
    model.eval()
    return model if dtype is None else model.to(dtype)


def _word_tokenizer() -> Any:
    """Whole words of the library's docstrings, most frequent first, with XLM-R's special tokens and template."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    words = collections.Counter(w for text in docstrings() for w in re.findall(r"\w+|[^\w\s]", text.lower()))
    ranked = sorted(words, key=lambda w: (-words[w], w))[: WORDS - len(special)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + ranked)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    fast: Any = PreTrainedTokenizerFast
    return fast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )


_MODULES = """
    argparse ast base64 bisect calendar collections configparser contextlib copy csv dataclasses datetime decimal difflib enum
    fileinput fractions functools gettext glob gzip hashlib heapq html inspect io ipaddress itertools json logging lzma math
    operator os pathlib pickle pprint random re sched shlex shutil socket sqlite3 statistics string subprocess tarfile tempfile
    textwrap threading time tokenize typing urllib.parse uuid wave weakref zipfile
"""
QUERIES = (
    "read rows from a csv file",
    "run a command and capture what it prints",
    "how do I split a path into folder and file name?",
    "search a string with a regular expression",
    "the standard deviation of a sample",
    "wait until another thread has finished",
    "compress",
    "parse the date and the time of day out of a text, with its time zone, whatever the format it was written in",
)


def docstrings() -> list[str]:
    """What Python's library says of its own functions and classes, in a fixed order; the same texts for one Python version."""
    found: dict[str, None] = {}
    for name in _MODULES.split():
        try:
            module = importlib.import_module(name)
        except ImportError:  # lzma and sqlite3 are missing from some builds of Python
            continue
        for member in sorted(getattr(module, "__all__", None) or vars(module)):
            thing = getattr(module, member, None)
            if member.startswith("_") or not callable(thing):
                continue
            if text := " ".join((inspect.getdoc(thing) or "").split()):
                found.setdefault(text)
    return list(found)


def default_pairs() -> list[tuple[str, str]]:
    """64 pairs: eight queries, eight documents each, from a few words to several hundred tokens."""
    documents = sorted((d for d in docstrings() if 12 <= len(d) <= 1600), key=lambda text: (len(text), text))
    step = len(documents) / (8 * len(QUERIES))
    # query j takes every eighth of 64 lengths, so each batch of eight holds short and long ones
    return [(query, documents[int((8 * k + j) * step)]) for j, query in enumerate(QUERIES) for k in range(8)]
