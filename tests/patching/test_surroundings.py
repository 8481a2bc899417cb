"""surroundings: whatever was done to a model before patch, after it or between calls, a call gives stock's answer or says no.

The truth is stock's own forward in float64, of a twin that the same was done to. A refusal names the place, and rk.unpatch,
which each refusal advises, gives stock's answer then.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import rerank_kernels as rk
from models import DECODERS, decoder, padded, rows, tiny
from rerank_kernels.models import bert, bound, packing, registry, roles
from rerank_kernels.models.fingerprint import Fingerprint
from surroundings import CLEANUPS, DECODER_MUTATIONS, MUTATIONS, Inapplicable

MODELS = (("bert", True), ("roberta", True), ("xlm-roberta", False), ("bert", False))
OF_DECODERS = tuple((kind, True) for kind in DECODERS)
MOMENTS = ("before patch", "after patch", "between calls", "after a copy")
LENGTHS = (7, 1, 23)
PAD = {"bert": 0, "roberta": 1, "xlm-roberta": 1}
REFUSALS = (rk.PatchError, RuntimeError, TypeError, ValueError)
# Of half precision: bounds of a served answer, and what has fewer digits there.
HALVES = {"half", "bfloat16_norm"}
# What stock computes, and we do too, whenever it comes. All else is refused at one moment at least.
SERVED = {
    *("act_gelu_tanh", "act_relu", "bfloat16_norm", "bias_removed", "chunked", "classifier_of_three_labels"),
    *("config_after_load", "dense_other", "dense_subclass", "dense_without_bias", "dropout_in_training_of_nothing"),
    *("dropout_share", "embedding_larger", "embedding_norm_without_affine", "encoder_other_weights", "eps"),
    *("feed_forward_pruned", "frozen", "half", "heads_with_scaling", "hook_on_the_model", "identity_for_dropout"),
    *("layer_subclass", "layers_emptied", "layers_repeated", "layers_reversed", "layers_shortened", "norm_without_affine"),
    *("norm_without_bias", "not_contiguous", "padding_idx", "pooler_gelu", "pruned_for_good", "shared_module", "tied"),
    "weights_written",
}


DONE = MUTATIONS | DECODER_MUTATIONS
SERVED_DECODERS = {
    f"decoder_{name}"
    for name in (*("scaled_attention", "norm_eps", "activation_relu", "layers_cut", "fewer_layers_by_config"),)
}


@contextlib.contextmanager
def undone() -> Iterator[None]:
    """What the mutations inside did outside the model is undone, and says nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            while CLEANUPS:
                CLEANUPS.pop()()


@functools.cache
def _made(family, head):
    return decoder(family) if family in DECODERS else tiny(family, head=head)


def fresh(family, head):
    return copy.deepcopy(_made(family, head))


def batch_of(family):
    """Of a decoder each padded place sees a token within its window: in float64 stock's eager attention gives NaN elsewhere."""
    return padded(rows((7, 4, 23) if family in DECODERS else LENGTHS), PAD.get(family, 0))


def answer(model, batch):
    out = model(**batch)
    found = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return found[batch["attention_mask"].bool()] if found.dim() == 3 else found


def steady(model, batch):
    """What stock gives; None if it fails, gives no numbers, or others at each call."""
    with torch.no_grad():
        try:
            first, second = answer(model, batch), answer(model, batch)
        except Exception:
            return None
    # not torch.equal: stock's last bits may depend on where its memory lies
    return first if first.device.type != "meta" and torch.allclose(first, second, rtol=1e-5, atol=1e-5) else None


@functools.lru_cache(maxsize=8)
def stock(family, head, names):
    """(float64, as it is) of a stock model that `names` were done to."""
    twin, batch = fresh(family, head), batch_of(family)
    with undone():
        try:
            for name in names:
                DONE[name](twin)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            raise Inapplicable(f"one takes away what another needs: {error}") from error
        plain = steady(twin, batch)
        try:
            return steady(twin.double(), batch), plain
        except (NotImplementedError, RuntimeError):
            return None, plain


def run(model_index, names, moment):
    """ "served" or "refused"; fails if the answer is another number than stock's, or if the refusal names no place."""
    family, head = (MODELS + OF_DECODERS)[model_index]
    truth, plain = stock(family, head, tuple(names))
    model, batch = fresh(family, head), batch_of(family)
    with undone():
        places = [DONE[name](model) for name in names] if moment == "before patch" else []
        try:
            rk.patch(model)
            if moment in ("between calls", "after a copy"):
                answer(model, batch)
        except REFUSALS as error:
            return refused(error, places, model, names, batch, plain)
        if moment == "after a copy":
            model = copy.deepcopy(model)
        if moment != "before patch":
            places = [DONE[name](model) for name in names]
        try:
            got = answer(model, batch)
        except REFUSALS as error:
            return refused(error, places, model, names, batch, plain)
    assert truth is not None, f"{got} came where stock gives nothing that holds"
    most = 2e-2 if HALVES & set(names) else 2e-5
    torch.testing.assert_close(got.double(), truth, rtol=most, atol=most)
    return "served"


def refused(error, places, model, names, batch, plain):
    assert any(place in str(error) for place in places), f"{str(error)!r} names none of {places}"
    rk.unpatch(model)
    if plain is not None:
        torch.testing.assert_close(steady(model, batch), plain, rtol=1e-6, atol=1e-6)
    return "refused"


def on_some_model(first, names, moment):
    """run() on the first model, counted from `first`, to which all of it can be done."""
    models = range(len(MODELS), len(MODELS + OF_DECODERS)) if names[0] in DECODER_MUTATIONS else range(len(MODELS))
    for i in (models[(first + step) % len(models)] for step in range(len(models))):
        with contextlib.suppress(Inapplicable):
            return run(i, names, moment)
    raise Inapplicable(names)


@pytest.mark.parametrize("name", DECODER_MUTATIONS)
def test_each_mutation_of_a_decoder_is_served_or_refused(name):
    at = list(DECODER_MUTATIONS).index(name)
    said = {on_some_model(at, [name], moment) for moment in MOMENTS}
    assert (said == {"served"}) == (name in SERVED_DECODERS), said


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_is_served_or_refused(name):
    at = list(MUTATIONS).index(name)
    said = {on_some_model(at, [name], moment) for moment in MOMENTS}
    assert (said == {"served"}) == (name in SERVED), said


def draws(seeds):
    """Two or three mutations and a moment for each seed."""
    for seed in seeds:
        draw = random.Random(seed)
        names = sorted(draw.sample(sorted(MUTATIONS), draw.choice((2, 2, 3))))
        yield pytest.param(seed, names, draw.choice(MOMENTS), id=f"{seed}-{'+'.join(names)}")


def several(seed, names, moment):
    with contextlib.suppress(Inapplicable):
        on_some_model(seed, names, moment)


@pytest.mark.parametrize(("seed", "names", "moment"), draws(range(60)))
def test_some_mutations_together(seed, names, moment):
    several(seed, names, moment)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("seed", "names", "moment"), draws(range(1000, 1600)))
def test_more_mutations_together(seed, names, moment):
    several(seed, names, moment)


# ---- each check taken out is seen -------------------------------------------------------------------------------------------


def without(what):
    """The check of roles.py without some of what a role says."""
    honest = roles.wrong

    def wrong(m, role, **rest):
        if what == "class":
            role = replace(role, classes=role.classes | {bound.name_of(m)})
        elif what == "drops":
            role = replace(role, drops=None)
        else:
            role = replace(role, assumes=tuple(a for a in role.assumes if a.attribute != what))
        return honest(m, role, **rest)

    return put((roles, registry), "wrong", wrong)


def blind(**parts):
    """Fingerprints that do not see some of it."""
    honest = Fingerprint.__init__

    def init(self, root, of):
        honest(self, root, of)
        vars(self).update(parts)

    return lambda patch: patch.setattr(Fingerprint, "__init__", init)


def put(holders, name, value):
    def in_place(patch):
        for holder in holders if isinstance(holders, tuple) else (holders,):
            patch.setattr(holder, name, value)

    return in_place


def any_subclass(patch):
    def first_known(cls):
        known = ("torch.nn.", "transformers.")
        return next((c for c in cls.__mro__ if c.__module__.startswith(known)), cls)

    patch.setattr(bound, "served_class", first_known)
    patch.setattr(roles, "served_class", first_known)
    patch.setattr(bound, "_name_of", lambda cls: f"{first_known(cls).__module__}.{first_known(cls).__qualname__}")


def copied_whole(patch):
    patch.setattr(bound.Forward, "__getstate__", lambda self: dict(vars(self)))
    patch.setattr(bound.Forward, "__setstate__", lambda self, state: vars(self).update(state))


NO_HOOKS = type("Module", (), {"_global_forward_hooks": {}, "_global_forward_pre_hooks": {}})
MUTANTS = {  # a check taken out, the mutation that shows it, and when
    "no scaling": (without("scaling"), "scaling", "before patch"),
    "no decoder": (without("config.is_decoder"), "decoder_config", "before patch"),
    "no attention function": (without("config._attn_implementation"), "attention_function", "before patch"),
    "no head size": (without("num_attention_heads"), "head_size_with_scaling", "before patch"),
    "no positions": (without("position_ids"), "positions_reversed", "before patch"),
    "no token types": (without("token_type_ids"), "types_of_one", "before patch"),
    "no shape of a norm": (without("normalized_shape"), "normalized_shape", "before patch"),
    "no maximum": (without("max_norm"), "embedding_with_a_maximum", "before patch"),
    "no inner function": (without("act"), "act_inner_function", "before patch"),
    "no class": (without("class"), "linear_for_dropout", "before patch"),
    "no class of a head": (without("class"), "tanh_for_embedding_dropout", "before patch"),
    "no dropout": (without("drops"), "dropout_in_training", "between calls"),
    "any forward of a class": (put((roles, registry), "overridden", lambda m: None), "forward_of_a_class", "before patch"),
    "any method": (any_subclass, "chunk_that_adds", "before patch"),
    "hooks and forwards": (put(roles, "_inside", lambda m, path: None), "hook_on_a_leaf", "before patch"),
    "forwards of instances": (put(roles, "_inside", lambda m, path: None), "forward_of_an_instance", "between calls"),
    "global hooks": (put(roles, "torch_modules", NO_HOOKS), "global_hook", "before patch"),
    "any tensor": (put(roles, "wrong_tensor", lambda p: None), "tensor_subclass", "before patch"),
    "any shape": (put(roles, "_wrong_shape", lambda *_: None), "weight_of_another_shape", "before patch"),
    "never looks again": (put(Fingerprint, "same", lambda self: True), "scaling", "between calls"),
    "no attributes": (blind(attributes=[]), "scaling", "between calls"),
    "no new attributes": (blind(dicts=[], sizes=[]), "forward_of_an_instance", "between calls"),
    "no modules": (blind(live=[], copies=[]), "dense_doubled", "between calls"),
    "no config": (blind(live=[], copies=[]), "decoder_config", "between calls"),
    "no hooks": (blind(unhooked=[]), "hook_on_a_leaf", "between calls"),
    "no classes": (blind(modules=[], types=[]), "class_changed", "between calls"),
    "no classes' methods": (blind(live=[], copies=[]), "forward_of_a_class", "between calls"),
    "no buffers": (blind(buffers=[], values=[]), "positions_reversed", "between calls"),
    "versions of buffers": (blind(buffers=[], values=[]), "positions_through_data", "between calls"),
    "methods of instances": (put(roles, "_shadowing", lambda m, served: None), "chunk_of_an_instance", "before patch"),
    "copies see the original": (copied_whole, "scaling", "after a copy"),
    "errors of ops as they are": (put(packing, "refuse", lambda *_: None), "float64_inside", "between calls"),
    "a pooler has tanh": (put(bert, "activation_of", lambda m: "tanh"), "pooler_gelu", "before patch"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_check_taken_out_is_seen(mutant, monkeypatch):
    """On BERT's classifier, where all of it can be done."""
    take_out, name, moment = MUTANTS[mutant]
    run(0, [name], moment)
    take_out(monkeypatch)
    with pytest.raises((AssertionError, TypeError) if mutant == "copies see the original" else AssertionError):
        run(0, [name], moment)
