"""Which decoders there are, and what one model type does otherwise than Llama: a row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rerank_kernels.models import rope
from rerank_kernels.models.bound import name_of

SLIDING = "sliding_attention"  # of config.layer_types: a layer with a window


@dataclass(frozen=True)
class ModelType:
    """Classes of transformers whose modules carry Llama's names, only behind another prefix."""

    prefix: str
    window: Callable[[Any, int], int | None] = lambda config, layer: None  # keys that a query of a layer sees, itself included
    eps: str = "variance_epsilon"  # of the norms
    offset: int = 0  # added to the norms' weights
    cast: str = "before"
    head_norms: bool = False  # queries and keys are normed, head by head
    scaled: bool = False  # embeddings are multiplied by the root of the model's width
    branch_norms: bool = False  # what attention and feed-forward layer give is normed, too, before it is added
    two_angles: bool = False  # layers with a window turn by angles of their own
    attention_cap: bool = False  # the attention module says how far its logits go
    word_cap: bool = False  # config says how far the language head's logits go
    fused: bool = False  # q, k and v are one matrix, gate and up another
    text: str = ""  # in the names of what is a model of text and images without it

    @property
    def model(self) -> str:
        return f"{self.prefix}{self.text}Model"

    @property
    def causal(self) -> str:
        return f"{self.prefix}ForCausalLM"

    @property
    def classifier(self) -> str:
        return f"{self.prefix}{self.text}ForSequenceClassification"

    def turns(self, config: Any) -> tuple[str, ...]:
        """Names of the layers' angles: "" where all have the same."""
        return tuple(sorted(set(config.layer_types))) if self.two_angles else ("",)

    def turn(self, config: Any, layer: int) -> str:
        """The one of `turns` that is a layer's."""
        return str(config.layer_types[layer]) if self.two_angles else ""


def _always(config: Any, layer: int) -> int | None:
    window: int | None = config.sliding_window
    return window


def _by_layer(config: Any, layer: int) -> int | None:
    return config.sliding_window if config.layer_types[layer] == SLIDING else None


_OF_GEMMA: dict[str, Any] = dict(eps="eps", offset=1, cast="after", scaled=True)
_SINCE_2: dict[str, Any] = dict(_OF_GEMMA, window=_by_layer, branch_norms=True, word_cap=True)

MODEL_TYPES = {
    "transformers.models.llama.modeling_llama": ModelType("Llama"),
    "transformers.models.mistral.modeling_mistral": ModelType("Mistral", _always),
    "transformers.models.qwen2.modeling_qwen2": ModelType("Qwen2", _by_layer),
    "transformers.models.qwen3.modeling_qwen3": ModelType("Qwen3", _by_layer, head_norms=True),
    "transformers.models.phi3.modeling_phi3": ModelType("Phi3", _always, fused=True),
    "transformers.models.gemma.modeling_gemma": ModelType("Gemma", **_OF_GEMMA),
    "transformers.models.gemma2.modeling_gemma2": ModelType("Gemma2", attention_cap=True, **_SINCE_2),
    "transformers.models.gemma3.modeling_gemma3": ModelType(
        "Gemma3", head_norms=True, two_angles=True, text="Text", **_SINCE_2
    ),
}


def type_of(m: Any) -> ModelType:
    return MODEL_TYPES[name_of(m).rpartition(".")[0]]


def inner(m: Any) -> Any:
    """The decoder in m: m itself where it has no head. Gemma 3's base_model names no module of it in transformers 4."""
    return m if name_of(m).rpartition(".")[2] == type_of(m).model else m.model


def angles_of(decoder: Any, turn: str) -> rope.Parameters:
    """What the decoder's rotary modules were made of, for one of the `turns` of its type."""
    local = getattr(decoder, "rotary_emb_local", None)  # transformers 4 has a module for each
    if local is not None and turn == SLIDING:
        return rope.parameters(local.config)
    return rope.parameters(decoder.rotary_emb.config, turn)
