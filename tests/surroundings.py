"""What people do to a model around patch: one function per mutation, which says the place that a refusal has to name.

test_surroundings.py does each to a patched model and to a stock twin of it. A mutation changes the model in place and returns
a piece of the path, attribute or class that the refusal names. What cannot be done to a model is skipped by `Inapplicable`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

MUTATIONS: dict[str, Callable[[Any], str]] = {}
CLEANUPS: list[Callable[[], object]] = []  # of what a mutation did outside the model


class Inapplicable(Exception):
    pass


def mutation(function: Callable[[Any], str]) -> Callable[[Any], str]:
    MUTATIONS[function.__name__] = function
    return function


def layer(m: Any, i: int = 1) -> Any:
    return m.base_model.encoder.layer[i]


def of(shape: tuple[int, ...], seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2


def filled(m: Any, seed: int = 5) -> Any:
    """Module m with parameters drawn from `seed`, so that a twin gets the same ones; in eval mode."""
    with torch.no_grad():
        for i, p in enumerate(m.parameters()):
            p.copy_(of(tuple(p.shape), seed + i))
    return m.eval()


def like(m: Any, dtype: torch.dtype | None = None) -> Any:
    return {"dtype": dtype or next(m.parameters()).dtype}


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2.0  # and not + 1: a norm behind it takes the mean away


class Named(nn.Linear):
    """Overrides nothing."""

    def rank(self) -> int:
        return min(self.weight.shape)


class Weightless(nn.Linear):
    """Its weight is computed: a property hides what a Linear holds."""

    @property
    def weight(self) -> Tensor:
        return 2.0 * self._parameters["weight"]  # type: ignore[operator]


class Adapter(nn.Module):
    """Stands where adapters put theirs, under the name of the class that they wrap."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down = filled(nn.Linear(base.in_features, 2, bias=False, **like(base)))
        self.up = filled(nn.Linear(2, base.out_features, bias=False, **like(base)))

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


Adapter.__name__ = Adapter.__qualname__ = "Linear"


class Quantised(nn.Module):
    """A Linear in 8 bits with one scale, as quantisers put it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        scale = base.weight.detach().abs().amax() / 127
        self.register_buffer("values", (base.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.values.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class Halved(nn.Parameter):
    """A tensor that means something else than the numbers that lie in its memory."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            plain = [a.as_subclass(Tensor) if isinstance(a, Tensor) else a for a in args]
            if function is nn.functional.linear:
                plain[1] = plain[1] * 0.5
            return function(*plain, **(kwargs or {}))


def _same(m: Any, cls: type) -> Any:
    """A module of class `cls` with all that m holds."""
    m.__class__ = cls
    return m


# ---- modules put in place of others -----------------------------------------------------------------------------------------


def _pooler(m: Any) -> Any:
    if m.base_model.pooler is None:
        raise Inapplicable
    return m.base_model.pooler


@mutation
def pooler_gelu(m: Any) -> str:
    _pooler(m).activation = nn.GELU()
    return "pooler"


@mutation
def pooler_hardtanh(m: Any) -> str:
    _pooler(m).activation = nn.Hardtanh()
    return "pooler.activation"


@mutation
def pooler_function(m: Any) -> str:
    del _pooler(m).activation
    _pooler(m).activation = torch.sin
    return "pooler.activation"


@mutation
def pooler_removed(m: Any) -> str:
    if not hasattr(m, "bert"):  # whose classifier reads it
        raise Inapplicable
    m.base_model.pooler = None
    return "pooler"


@mutation
def linear_for_dropout(m: Any) -> str:
    layer(m).output.dropout = filled(nn.Linear(64, 64, **like(m)))
    return "layer.1.output.dropout"


@mutation
def linear_for_attention_dropout(m: Any) -> str:
    layer(m).attention.self.dropout = filled(nn.Linear(64, 64, **like(m)))
    return "layer.1.attention.self.dropout"


@mutation
def tanh_for_embedding_dropout(m: Any) -> str:
    m.base_model.embeddings.dropout = nn.Tanh()
    return "embeddings.dropout"


@mutation
def identity_for_dropout(m: Any) -> str:
    layer(m).output.dropout = nn.Identity()
    return "dropout"


@mutation
def dense_doubled(m: Any) -> str:
    layer(m).output.dense = filled(Doubled(96, 64, **like(m)))
    return "layer.1.output.dense"


@mutation
def dense_subclass(m: Any) -> str:
    layer(m).output.dense = filled(Named(96, 64, **like(m)))
    return "layer.1.output.dense"


@mutation
def dense_weightless(m: Any) -> str:
    layer(m).output.dense = _same(filled(nn.Linear(96, 64, **like(m))), Weightless)
    return "layer.1.output.dense"


@mutation
def dense_other(m: Any) -> str:
    layer(m).output.dense = filled(nn.Linear(96, 64, **like(m)))
    return "layer.1.output.dense"


@mutation
def dense_without_bias(m: Any) -> str:
    layer(m).attention.self.query = filled(nn.Linear(64, 64, bias=False, **like(m)))
    return "query"


@mutation
def dense_identity(m: Any) -> str:
    layer(m).attention.output.dense = nn.Identity()
    return "layer.1.attention.output.dense"


@mutation
def dense_sequence(m: Any) -> str:
    layer(m).attention.output.dense = nn.Sequential(filled(nn.Linear(64, 64, **like(m))), nn.Tanh())
    return "layer.1.attention.output.dense"


@mutation
def dense_hidden_by_an_attribute(m: Any) -> str:
    layer(m).output.__dict__["dense"] = filled(Doubled(96, 64, **like(m)))
    return "layer.1.output.dense"


@mutation
def dense_adapter(m: Any) -> str:
    layer(m).attention.self.value = Adapter(layer(m).attention.self.value)
    return "layer.1.attention.self.value"


@mutation
def dense_quantised(m: Any) -> str:
    layer(m).attention.self.value = Quantised(layer(m).attention.self.value)
    return "layer.1.attention.self.value"


@mutation
def norm_without_affine(m: Any) -> str:
    layer(m).output.LayerNorm = nn.LayerNorm(64, elementwise_affine=False)
    return "LayerNorm"


@mutation
def embedding_norm_without_affine(m: Any) -> str:
    m.base_model.embeddings.LayerNorm = nn.LayerNorm(64, elementwise_affine=False)
    return "LayerNorm"


@mutation
def norm_without_bias(m: Any) -> str:
    layer(m).output.LayerNorm = filled(nn.LayerNorm(64, bias=False, **like(m)))
    return "LayerNorm"


@mutation
def norm_rms(m: Any) -> str:
    layer(m).output.LayerNorm = filled(nn.RMSNorm(64, **like(m)))
    return "layer.1.output.LayerNorm"


@mutation
def norm_identity(m: Any) -> str:
    layer(m).output.LayerNorm = nn.Identity()
    return "layer.1.output.LayerNorm"


@mutation
def act_relu(m: Any) -> str:
    layer(m).intermediate.intermediate_act_fn = nn.ReLU()
    return "intermediate_act_fn"


@mutation
def act_gelu_tanh(m: Any) -> str:
    layer(m).intermediate.intermediate_act_fn = nn.GELU(approximate="tanh")
    return "intermediate_act_fn"


@mutation
def act_hardswish(m: Any) -> str:
    layer(m).intermediate.intermediate_act_fn = nn.Hardswish()
    return "layer.1.intermediate"


@mutation
def act_function(m: Any) -> str:
    del layer(m).intermediate.intermediate_act_fn
    layer(m).intermediate.intermediate_act_fn = torch.sin
    return "layer.1.intermediate"


@mutation
def act_inner_function(m: Any) -> str:
    layer(m).intermediate.intermediate_act_fn.act = torch.sin
    return "layer.1.intermediate.intermediate_act_fn"


@mutation
def layers_shortened(m: Any) -> str:
    m.base_model.encoder.layer = m.base_model.encoder.layer[:1]
    return "layer"


@mutation
def layers_emptied(m: Any) -> str:
    m.base_model.encoder.layer = nn.ModuleList()
    return "layer"


@mutation
def layers_reversed(m: Any) -> str:
    m.base_model.encoder.layer = nn.ModuleList(reversed(list(m.base_model.encoder.layer)))
    return "layer"


@mutation
def layers_repeated(m: Any) -> str:
    m.base_model.encoder.layer = nn.ModuleList([layer(m), layer(m), layer(m, 0)])
    return "layer"


@mutation
def layer_identity(m: Any) -> str:
    m.base_model.encoder.layer[1] = nn.Identity()
    return "layer.1"


@mutation
def layer_that_adds(m: Any) -> str:
    cls = type(layer(m))
    forward = cls.forward
    own = type(cls.__name__, (cls,), {"forward": lambda self, x, *a, **k: _added(forward(self, x, *a, **k))})
    _same(layer(m), own)
    return "layer.1"


def _added(out: Any) -> Any:
    return (out[0] + 0.5, *out[1:]) if isinstance(out, tuple) else out + 0.5


@mutation
def chunk_that_adds(m: Any) -> str:
    cls = type(layer(m))
    own = type(cls.__name__, (cls,), {"feed_forward_chunk": lambda self, x: cls.feed_forward_chunk(self, x) + 0.5})
    _same(layer(m), own)
    return "layer.1"


@mutation
def layer_subclass(m: Any) -> str:
    _same(layer(m), type("Layer", (type(layer(m)),), {"__doc__": "overrides nothing", "depth": 3}))
    return "layer.1"


@mutation
def model_subclass(m: Any) -> str:
    _same(m, type("Mine", (type(m),), {"__doc__": "overrides nothing", "describe": lambda self: "mine"}))
    return "Mine"


@mutation
def model_that_scales(m: Any) -> str:
    forward = type(m).forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        out["logits" if "logits" in out else "last_hidden_state"] *= 2.0
        return out

    _same(m, type("Mine", (type(m),), {"forward": scaled}))
    return "Mine"


@mutation
def encoder_subclass_that_scales(m: Any) -> str:
    base = m.base_model.embeddings
    cls = type(base)
    _same(base, type(cls.__name__, (cls,), {"forward": lambda self, *a, **k: 2.0 * cls.forward(self, *a, **k)}))
    return "embeddings"


@mutation
def classifier_of_three_labels(m: Any) -> str:
    _head(m, filled(nn.Linear(64, 3, **like(m))))
    return "classifier"


@mutation
def classifier_sequence(m: Any) -> str:
    _head(m, nn.Sequential(filled(nn.Linear(64, 8, **like(m))), nn.ReLU(), filled(nn.Linear(8, 1, **like(m)))))
    return "classifier"


@mutation
def classifier_doubled(m: Any) -> str:
    _head(m, filled(Doubled(64, 1, **like(m))))
    return "classifier"


def _head(m: Any, new: nn.Module) -> None:
    if not hasattr(m, "classifier"):
        raise Inapplicable
    if hasattr(m.classifier, "out_proj"):
        m.classifier.out_proj = new
    else:
        m.classifier = new


@mutation
def encoder_of_another_type(m: Any) -> str:
    from models import tiny

    if not hasattr(m, "classifier"):
        raise Inapplicable
    other = tiny("bert" if m.base_model_prefix == "roberta" else "roberta", head=False, seed=3)
    setattr(m, m.base_model_prefix, other.to(**like(m)))
    return m.base_model_prefix


@mutation
def encoder_other_weights(m: Any) -> str:
    from models import tiny

    if not hasattr(m, "classifier"):
        raise Inapplicable
    family = {"BertModel": "bert", "RobertaModel": "roberta", "XLMRobertaModel": "xlm-roberta"}[type(m.base_model).__name__]
    setattr(m, m.base_model_prefix, tiny(family, head=False, seed=3).to(**like(m)))
    return m.base_model_prefix


@mutation
def embedding_with_a_maximum(m: Any) -> str:
    m.base_model.embeddings.word_embeddings.max_norm = 0.5
    return "embeddings.word_embeddings"


@mutation
def embedding_larger(m: Any) -> str:
    m.base_model.embeddings.word_embeddings = filled(nn.Embedding(300, 64, **like(m)))
    return "embeddings.word_embeddings"


@mutation
def compiled_inside(m: Any) -> str:
    layer(m).output.dense = torch.compile(layer(m).output.dense, backend="eager")
    return "layer.1.output.dense"


@mutation
def data_parallel_inside(m: Any) -> str:
    m.base_model.encoder.layer[1] = nn.DataParallel(layer(m))
    return "layer.1"


# ---- attributes -------------------------------------------------------------------------------------------------------------


@mutation
def scaling(m: Any) -> str:
    layer(m).attention.self.scaling = 0.01
    return "scaling"


@mutation
def heads(m: Any) -> str:
    own = layer(m).attention.self
    own.num_attention_heads, own.attention_head_size = 2, 32
    return "layer.1.attention.self"


@mutation
def heads_with_scaling(m: Any) -> str:
    own = layer(m).attention.self
    own.num_attention_heads, own.attention_head_size, own.scaling = 2, 32, 32**-0.5
    return "layer.1.attention.self"


@mutation
def head_size(m: Any) -> str:
    layer(m).attention.self.attention_head_size = 8
    return "layer.1.attention.self"


@mutation
def head_size_with_scaling(m: Any) -> str:
    own = layer(m).attention.self
    own.attention_head_size, own.scaling = 8, 8**-0.5
    return "layer.1.attention.self"


@mutation
def causal_module(m: Any) -> str:
    layer(m).attention.self.is_causal = True
    return "is_causal"


@mutation
def decoder_config(m: Any) -> str:
    m.config.is_decoder = True
    return "is_decoder"


@mutation
def attention_function(m: Any) -> str:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def mine(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        return v.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("mine", mine)
    m.config._attn_implementation = "mine"
    for own in m.base_model.encoder.layer:
        own.attention.self.config._attn_implementation = "mine"
    return "_attn_implementation"


@mutation
def eps(m: Any) -> str:
    layer(m).output.LayerNorm.eps = 0.3
    return "eps"


@mutation
def eps_negative(m: Any) -> str:
    layer(m).output.LayerNorm.eps = -0.01
    return "layer.1.output.LayerNorm"


@mutation
def normalized_shape(m: Any) -> str:
    layer(m).output.LayerNorm.normalized_shape = (32,)
    return "normalized_shape"


def _counted(m: Any) -> Tensor:
    if hasattr(m.base_model.embeddings, "padding_idx"):  # RoBERTa counts by itself
        raise Inapplicable
    ids: Tensor = m.base_model.embeddings.position_ids
    return ids


@mutation
def positions_reversed(m: Any) -> str:
    ids = _counted(m)
    ids.copy_(ids.flip(-1).clone())
    return "position_ids"


@mutation
def positions_replaced(m: Any) -> str:
    m.base_model.embeddings.position_ids = _counted(m).clone() + 1
    return "position_ids"


@mutation
def types_of_one(m: Any) -> str:
    if not hasattr(m.base_model.embeddings, "token_type_ids"):
        raise Inapplicable
    m.base_model.embeddings.token_type_ids += 1
    return "token_type_ids"


@mutation
def padding_idx(m: Any) -> str:
    if not hasattr(m.base_model.embeddings, "padding_idx"):
        raise Inapplicable
    m.base_model.embeddings.padding_idx = 4
    return "padding_idx"


@mutation
def config_after_load(m: Any) -> str:
    m.config.hidden_act, m.config.layer_norm_eps, m.config.num_attention_heads = "relu", 0.5, 2
    m.config.hidden_dropout_prob = 0.7
    return "config"


@mutation
def chunked(m: Any) -> str:
    for one in m.base_model.encoder.layer:
        one.chunk_size_feed_forward = 1
    return "chunk"


@mutation
def gradient_checkpointing(m: Any) -> str:
    m.gradient_checkpointing_enable()
    return "word_embeddings"  # on which transformers puts a hook


@mutation
def dropout_share(m: Any) -> str:
    layer(m).output.dropout.p = 0.9
    return "dropout"


@mutation
def dropout_in_training(m: Any) -> str:
    layer(m).output.dropout.train()
    return "layer.1.output.dropout"


@mutation
def head_dropout_in_training(m: Any) -> str:
    if not hasattr(m, "classifier"):
        raise Inapplicable
    (m.dropout if hasattr(m, "dropout") else m.classifier.dropout).train()
    return "dropout"


@mutation
def attention_in_training(m: Any) -> str:
    layer(m).attention.self.training = True
    return "layer.1.attention.self"


@mutation
def layer_in_training(m: Any) -> str:
    layer(m, 0).train()
    return "layer.0."


@mutation
def dropout_in_training_of_nothing(m: Any) -> str:
    layer(m).output.dropout.train()
    layer(m).output.dropout.p = 0.0
    return "layer.1.output.dropout"


@mutation
def model_in_training(m: Any) -> str:
    m.train()
    return "set to train"


@mutation
def module_added(m: Any) -> str:
    m.loss = nn.CrossEntropyLoss()
    return "CrossEntropyLoss"


# ---- hooks and forwards -----------------------------------------------------------------------------------------------------


@mutation
def hook(m: Any) -> str:
    layer(m).register_forward_hook(lambda _, x, out: _added(out))
    return "layer.1"


@mutation
def hook_on_a_leaf(m: Any) -> str:
    layer(m).output.dense.register_forward_hook(lambda _, x, out: out * 2.0)
    return "layer.1.output.dense"


@mutation
def hook_on_an_activation(m: Any) -> str:
    layer(m).intermediate.intermediate_act_fn.register_forward_hook(lambda _, x, out: out * 2.0)
    return "layer.1.intermediate.intermediate_act_fn"


@mutation
def pre_hook(m: Any) -> str:
    layer(m).output.dense.register_forward_pre_hook(lambda _, x: (x[0] * 2.0,))
    return "layer.1.output.dense"


@mutation
def hook_with_kwargs(m: Any) -> str:
    layer(m).output.dense.register_forward_hook(lambda _, x, k, out: out * 2.0, with_kwargs=True)
    return "layer.1.output.dense"


@mutation
def hooks_replaced(m: Any) -> str:
    layer(m).output.dense._forward_hooks = {0: lambda _, x, out: out * 2.0}
    return "layer.1.output.dense"


@mutation
def hook_on_the_model(m: Any) -> str:
    m.register_forward_hook(lambda _, x, out: type(out)({k: v * 2.0 for k, v in out.items()}))
    return "the model"


@mutation
def global_hook(m: Any) -> str:
    add = lambda one, x, out: out * 2.0 if type(one) is nn.Linear else None  # noqa: E731
    CLEANUPS.append(nn.modules.module.register_module_forward_hook(add).remove)
    return "global forward hooks"


@mutation
def global_pre_hook(m: Any) -> str:
    double = lambda one, x: (x[0] * 2.0,) if type(one) is nn.Linear else None  # noqa: E731
    CLEANUPS.append(nn.modules.module.register_module_forward_pre_hook(double).remove)
    return "global forward hooks"


@mutation
def forward_of_an_instance(m: Any) -> str:
    dense = layer(m).output.dense
    dense.forward = lambda x: nn.functional.linear(x, dense.weight) * 2.0
    return "layer.1.output.dense"


@mutation
def forward_method(m: Any) -> str:
    pooled = layer(m).output.LayerNorm
    pooled.forward = types.MethodType(lambda self, x: x * self.weight, pooled)
    return "layer.1.output.LayerNorm"


@mutation
def forward_wrapped(m: Any) -> str:
    dense = layer(m).output.dense
    dense.forward = functools.partial(lambda old, x: old(x) * 2.0, dense.forward)
    return "layer.1.output.dense"


@mutation
def forward_of_the_encoder(m: Any) -> str:
    if not hasattr(m, "classifier"):
        raise Inapplicable
    base, own = m.base_model, type(m.base_model).forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        out = own(base, *args, **kwargs)
        out["last_hidden_state"] *= 2.0
        if out["pooler_output"] is not None:
            out["pooler_output"] *= 2.0
        return out

    base.forward = doubled
    return m.base_model_prefix


@mutation
def chunk_of_an_instance(m: Any) -> str:
    one = layer(m)
    one.feed_forward_chunk = lambda x: x * 2.0
    return "layer.1"


@mutation
def call_of_an_instance(m: Any) -> str:
    dense = layer(m).output.dense
    dense._call_impl = lambda x: dense.forward(x) * 2.0
    return "layer.1.output.dense"


@mutation
def chunk_of_a_class(m: Any) -> str:
    _replaced(type(layer(m)), lambda self, x: x * 2.0, "feed_forward_chunk")
    return "layer.0"


@mutation
def positions_of_a_class(m: Any) -> str:
    cls = type(m.base_model.embeddings)
    if not hasattr(cls, "create_position_ids_from_input_ids"):
        raise Inapplicable
    _replaced(cls, staticmethod(lambda ids, *_: torch.full_like(ids, 5)), "create_position_ids_from_input_ids")
    return "embeddings"


@mutation
def eager_function(m: Any) -> str:
    import sys

    own = sys.modules[type(m).__module__]
    if not hasattr(own, "eager_attention_forward"):
        raise Inapplicable
    _replaced(own, lambda _, q, k, v, *a, **kw: (v.transpose(1, 2).contiguous(), None), "eager_attention_forward")
    return "_attn_implementation"


@mutation
def positions_through_data(m: Any) -> str:
    _counted(m).data.add_(1)
    return "position_ids"


@mutation
def class_changed(m: Any) -> str:
    layer(m).output.dense.__class__ = Doubled
    return "layer.1.output.dense"


@mutation
def class_changed_of_an_activation(m: Any) -> str:
    layer(m).intermediate.intermediate_act_fn.__class__ = nn.Tanh
    return "intermediate"


@mutation
def forward_of_a_class(m: Any) -> str:
    _replaced(type(layer(m).output), lambda self, x, residual: self.LayerNorm(self.dense(x)))
    return "layer.0.output"


@mutation
def forward_of_linear(m: Any) -> str:
    _replaced(nn.Linear, lambda self, x: nn.functional.linear(x, self.weight, self.bias) * 2.0)
    return "Linear"


def _replaced(cls: Any, function: Any, name: str = "forward") -> None:
    was = cls.__dict__[name]
    setattr(cls, name, function)
    CLEANUPS.append(lambda: setattr(cls, name, was))


@mutation
def dispatched(m: Any) -> str:
    """accelerate's add_hook_to_module, the lines that decide."""
    for one in m.base_model.encoder.layer:
        _dispatch(one.output.dense)
    return "accelerate"


def _dispatch(m: Any) -> None:
    old = m._old_forward = m.forward
    m._hf_hook = "AlignDevicesHook"
    m.forward = functools.update_wrapper(functools.partial(lambda m, *a, **k: m._old_forward(*a, **k), m), old)


# ---- parameters -------------------------------------------------------------------------------------------------------------


@mutation
def parametrized(m: Any) -> str:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2.0 * x

    parametrize.register_parametrization(layer(m).output.dense, "weight", Double())
    return "layer.1.output.dense"


@mutation
def weight_norm(m: Any) -> str:
    parametrizations.weight_norm(layer(m).output.dense)
    return "layer.1.output.dense"


@mutation
def weight_norm_by_a_hook(m: Any) -> str:
    nn.utils.weight_norm(layer(m).output.dense)
    return "layer.1.output.dense"


@mutation
def pruned(m: Any) -> str:
    prune.l1_unstructured(layer(m).output.dense, "weight", 0.5)
    return "layer.1.output.dense"


@mutation
def pruned_for_good(m: Any) -> str:
    prune.l1_unstructured(layer(m).output.dense, "weight", 0.5)
    prune.remove(layer(m).output.dense, "weight")
    return "layer.1.output.dense"


@mutation
def float64(m: Any) -> str:
    m.double()
    return "float64"


@mutation
def float64_inside(m: Any) -> str:
    layer(m).output.dense.double()
    return "layer.1.output.dense"


@mutation
def half(m: Any) -> str:
    m.half()
    return "half"


@mutation
def bfloat16_norm(m: Any) -> str:
    layer(m).output.LayerNorm.bfloat16()
    return "bfloat16"


@mutation
def meta(m: Any) -> str:
    m.to("meta")
    return "meta"


@mutation
def meta_inside(m: Any) -> str:
    layer(m).to("meta")
    return "layer.1."


@mutation
def sparse(m: Any) -> str:
    dense = layer(m).output.dense
    dense.weight = nn.Parameter(dense.weight.detach().to_sparse(), requires_grad=False)
    return "layer.1.output.dense"


@mutation
def tensor_subclass(m: Any) -> str:
    dense = layer(m).output.dense
    dense.weight = Halved(dense.weight.detach(), requires_grad=False)
    return "layer.1.output.dense"


@mutation
def int8(m: Any) -> str:
    dense = layer(m).output.dense
    dense.weight = nn.Parameter((dense.weight.detach() * 100).to(torch.int8), requires_grad=False)
    return "layer.1.output.dense"


@mutation
def bias_removed(m: Any) -> str:
    layer(m).output.dense.bias = None
    return "bias"


@mutation
def weight_removed(m: Any) -> str:
    layer(m).output.dense.weight = None
    return "layer.1.output.dense"


@mutation
def weight_of_another_shape(m: Any) -> str:
    dense = layer(m).output.dense
    dense.weight = nn.Parameter(dense.weight.detach()[:, :48].clone())
    return "layer.1.output.dense"


@mutation
def feed_forward_pruned(m: Any) -> str:
    up, down = layer(m).intermediate.dense, layer(m).output.dense
    up.weight, up.bias = nn.Parameter(up.weight.detach()[:40].clone()), nn.Parameter(up.bias.detach()[:40].clone())
    down.weight = nn.Parameter(down.weight.detach()[:, :40].clone())
    return "layer.1"


@mutation
def tied(m: Any) -> str:
    layer(m, 0).output.dense.weight = layer(m, 1).output.dense.weight
    return "layer"


@mutation
def shared_module(m: Any) -> str:
    layer(m, 0).output.LayerNorm = layer(m, 1).output.LayerNorm
    return "layer"


@mutation
def not_contiguous(m: Any) -> str:
    dense = layer(m).output.dense
    dense.weight = nn.Parameter(dense.weight.detach().t().contiguous().t())
    return "layer"


@mutation
def frozen(m: Any) -> str:
    m.requires_grad_(False)
    return "grad"


@mutation
def weights_written(m: Any) -> str:
    with torch.no_grad():
        layer(m).output.dense.weight.mul_(1.5)
    return "weight"


# ---- decoders ---------------------------------------------------------------------------------------------------------------

DECODER_MUTATIONS: dict[str, Callable[[Any], str]] = {}


def of_a_decoder(function: Callable[[Any], str]) -> Callable[[Any], str]:
    DECODER_MUTATIONS[f"decoder_{function.__name__}"] = function
    return function


def block(m: Any, i: int = 1) -> Any:
    return m.base_model.layers[i]


@of_a_decoder
def turns_faster(m: Any) -> str:
    m.base_model.rotary_emb.inv_freq.mul_(2.0)
    return "inv_freq"


@of_a_decoder
def turns_through_data(m: Any) -> str:
    m.base_model.rotary_emb.inv_freq.data.mul_(2.0)
    return "inv_freq"


@of_a_decoder
def angles_scaled(m: Any) -> str:
    m.base_model.rotary_emb.attention_scaling = 1.5
    return "attention_scaling"


@of_a_decoder
def config_turns_faster(m: Any) -> str:
    """transformers made its frequencies when it was loaded, and ours come from the config."""
    if getattr(m.config, "rope_parameters", None) is None:
        m.config.rope_theta = 50.0
    else:
        m.config.rope_parameters = {**m.config.rope_parameters, "rope_theta": 50.0}
    return "inv_freq"


@of_a_decoder
def scaled_attention(m: Any) -> str:
    block(m).self_attn.scaling = 0.05
    return "scaling"


@of_a_decoder
def head_of_another_size(m: Any) -> str:
    block(m).self_attn.head_dim = 8
    return "self_attn"


@of_a_decoder
def groups(m: Any) -> str:
    block(m).self_attn.num_key_value_groups *= 2
    return "num_key_value_groups"


@of_a_decoder
def norm_eps(m: Any) -> str:
    norm = block(m).input_layernorm
    setattr(norm, "eps" if hasattr(norm, "eps") else "variance_epsilon", 0.2)
    return "eps"


@of_a_decoder
def norm_replaced(m: Any) -> str:
    block(m).input_layernorm = filled(nn.RMSNorm(block(m).mlp.gate_proj.in_features))
    return "layers.1.input_layernorm"


@of_a_decoder
def last_norm_identity(m: Any) -> str:
    m.base_model.norm = nn.Identity()
    return "norm"


@of_a_decoder
def activation_relu(m: Any) -> str:
    block(m).mlp.act_fn = nn.ReLU()
    return "act_fn"


@of_a_decoder
def activation_hardswish(m: Any) -> str:
    block(m).mlp.act_fn = nn.Hardswish()
    return "layers.1.mlp"


@of_a_decoder
def projection_doubled(m: Any) -> str:
    o = block(m).self_attn.o_proj
    block(m).self_attn.o_proj = _same(o, Doubled)
    return "layers.1.self_attn.o_proj"


@of_a_decoder
def projection_adapted(m: Any) -> str:
    block(m).mlp.down_proj = Adapter(block(m).mlp.down_proj)
    return "layers.1.mlp.down_proj"


@of_a_decoder
def projection_of_more_rows(m: Any) -> str:
    down = block(m).mlp.down_proj
    down.weight = nn.Parameter(down.weight.detach()[:, :-2].clone())
    return "layers.1.mlp.down_proj"


@of_a_decoder
def layers_cut(m: Any) -> str:
    m.base_model.layers = m.base_model.layers[:1]
    return "layers"


@of_a_decoder
def fewer_layers_by_config(m: Any) -> str:
    m.config.num_hidden_layers = 1
    return "num_hidden_layers"


@of_a_decoder
def block_hooked(m: Any) -> str:
    block(m).mlp.register_forward_hook(lambda _, x, out: out * 2.0)
    return "layers.1.mlp"


@of_a_decoder
def block_that_adds(m: Any) -> str:
    forward = type(block(m)).forward
    block(m).forward = lambda *a, **k: _added(forward(block(m), *a, **k))
    return "layers.1"


@of_a_decoder
def mlp_of_a_class(m: Any) -> str:
    _replaced(type(block(m).mlp), lambda self, x: self.down_proj(self.up_proj(x)))
    return "layers.0.mlp"


@of_a_decoder
def head_doubled(m: Any) -> str:
    m.lm_head = _same(m.lm_head, Doubled)
    return "lm_head"


@of_a_decoder
def float64_block(m: Any) -> str:
    block(m).mlp.up_proj.double()
    return "layers.1.mlp.up_proj"


@of_a_decoder
def words_with_a_maximum(m: Any) -> str:
    m.base_model.embed_tokens.max_norm = 0.5
    return "embed_tokens"


@of_a_decoder
def words_scaled(m: Any) -> str:
    if not hasattr(m.base_model.embed_tokens, "embed_scale"):
        raise Inapplicable
    m.base_model.embed_tokens.embed_scale.mul_(2.0)
    return "embed_scale"


@of_a_decoder
def attention_dropout_in_training(m: Any) -> str:
    block(m).self_attn.attention_dropout = 0.5
    block(m).self_attn.training = True
    return "layers.1.self_attn"
