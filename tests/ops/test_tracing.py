"""What is traced or exported gives the patched model's bits for every batch, or is refused while it is traced.

A tracer runs a forward once and writes down what it did. So whatever looks at numbers (how many tokens, which are valid) has
to be an op of its own; the mutants at the end show that the tests see one that is not.
"""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_compile import CASES, arguments, outputs
from torch import Tensor, nn

import cases
import lora
import rerank_kernels as rk
import systems
from cases import Case, numbers
from invariants import all_same, same
from models import decoder, padded, rows, tiny
from rerank_kernels.backend import modes
from rerank_kernels.models import bert, bound, packing
from rerank_kernels.models import decoder as decoders
from rerank_kernels.models.bound import PatchError
from rerank_kernels.ops import opaque

ROOT = Path(__file__).parents[2]
FAMILIES = ("bert", "xlm-roberta", "modernbert")
# lengths, padded left, width: two equal rows, other lengths, wider, a row without tokens
OTHERS = (((9, 9), False, 0), ((3, 12, 1), False, 20), ((5,), True, 8), ((40, 2), True, 0), ((0, 3), False, 0))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """PyTorch calls torch.jit deprecated; a TracerWarning would mean that a number was baked in."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("error", category=torch.jit.TracerWarning)
        yield


def patched(family: str = "bert", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = tiny(family, dtype, **options)
    rk.patch(model)
    return model


def batches(pad: int) -> list[dict[str, Tensor]]:
    """The first is what is traced: one row."""
    return [padded(rows((9,)), pad), *(padded(rows(n, 3), pad, left=left, to=to) for n, left, to in OTHERS)]


def tensors(out: Any) -> tuple[Tensor, ...]:
    return tuple(out.values()) if isinstance(out, dict) else out if isinstance(out, tuple) else (out,)


def saved(traced: Any) -> Any:
    file, which = io.BytesIO(), torch.jit if isinstance(traced, torch.jit.ScriptModule) else torch.export
    which.save(traced, file)
    file.seek(0)
    loaded = which.load(file)
    return loaded if which is torch.jit else loaded.module()


def jit(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Any:
    return torch.jit.trace(model, example_kwarg_inputs=batch, strict=False, **options)


def exported(model: nn.Module, batch: dict[str, Tensor], *, strict: bool = False) -> Any:
    sizes = {0: torch.export.Dim("B"), 1: torch.export.Dim("T")}
    return torch.export.export(model, (), batch, dynamic_shapes=dict.fromkeys(batch, sizes), strict=strict)


def gives_the_models_bits(model: Any, traced: Callable[..., Any], pad: int, *, by_place: bool = False) -> None:
    for batch in batches(pad):
        got = tensors(traced(*batch.values()) if by_place else traced(**batch))
        want = tensors(model(**batch))
        all_same(got, want, f"traced, {tuple(batch['input_ids'].shape)}")
        assert not any(t.requires_grad for t in got)


class Logits(nn.Module):
    """What one writes around a model for a server: tensors in, tensors out."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.inner(input_ids=ids, attention_mask=mask).logits
        return logits


# ---- whole models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [True, False], ids=["classifier", "encoder"])
@pytest.mark.parametrize("family", FAMILIES)
def test_jit_trace(family: str, head: bool) -> None:
    model = patched(family, head=head)
    pad = model.config.pad_token_id
    traced = jit(model, batches(pad)[0])
    gives_the_models_bits(model, traced, pad)
    gives_the_models_bits(model, saved(traced), pad)


def test_jit_trace_by_place_and_frozen() -> None:
    model = patched()
    traced = torch.jit.trace(model, tuple(batches(0)[0].values()), strict=False)
    gives_the_models_bits(model, traced, 0, by_place=True)
    gives_the_models_bits(model, torch.jit.freeze(traced), 0, by_place=True)
    gives_the_models_bits(model, torch.jit.optimize_for_inference(traced), 0, by_place=True)


@pytest.mark.parametrize(
    ("family", "strict", "head"),
    [("bert", False, True), ("xlm-roberta", True, False), ("modernbert", False, True)],
    ids=["classifier", "encoder, strictly", "ModernBERT"],
)
def test_export(family: str, strict: bool, head: bool) -> None:
    model = patched(family, head=head)
    pad = model.config.pad_token_id
    program = exported(model, batches(pad)[2], strict=strict)  # PyTorch takes a size of 1 for fixed
    gives_the_models_bits(model, program.module(), pad)
    gives_the_models_bits(model, saved(program), pad)
    gives_the_models_bits(model, program.run_decompositions().module(), pad)


def test_in_half_precision() -> None:
    model = patched("bert", torch.bfloat16)
    gives_the_models_bits(model, jit(model, batches(0)[0]), 0)
    gives_the_models_bits(model, exported(model, batches(0)[2]).module(), 0)


def test_the_arguments_that_a_forward_takes() -> None:
    """Token types of one row for all, positions, embeddings, and no mask at all."""
    model = patched()
    first, *others = (dict(batch, token_type_ids=batch["input_ids"] % 2) for batch in batches(0))
    places = [dict(batch, position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(min=0) + 1) for batch in (first, *others)]
    words = model.bert.embeddings.word_embeddings
    embeds = [
        {"inputs_embeds": words(b["input_ids"]).detach(), "attention_mask": b["attention_mask"]} for b in (first, *others)
    ]
    bare = [{"input_ids": rows((n,) * b)[0].expand(b, -1)} for b, n in ((1, 9), (3, 9), (2, 4))]
    for given in ([first, *others], places, embeds, bare):
        for f in (jit(model, given[0]), exported(model, given[2]).module()):
            for batch in given:
                same(tensors(f(**batch))[0], model(**batch).logits, str(list(batch)))


def test_a_traced_model_looks_when_it_runs() -> None:
    """What the patched model refuses by a look at numbers, the traced one refuses in the same words."""
    model, (first, two, wide, *_) = patched(), batches(0)
    wrong: tuple[tuple[dict[str, Tensor], str], ...] = (
        ({**wide, "attention_mask": (wide["attention_mask"] - 1) * 10000}, "attention_mask must be nonzero where a token is"),
        (
            {**two, "attention_mask": first["attention_mask"]},
            r"attention_mask must be \[B, T\] = \[2, 9\]|Guard failed: attention_mask",
        ),
        ({**two, "input_ids": two["input_ids"] + 500}, r"input_ids must be in \[0, 159\]"),
        (padded(rows((141, 3)), 0), "input_ids must be at most 140 tokens a sequence"),
    )
    for f in (jit(model, first), exported(model, wide).module()):
        for batch, words in wrong:
            with pytest.raises(Exception, match=words):
                f(**batch)
            assert torch.is_grad_enabled(), "left off after an error"
            with pytest.raises(ValueError, match=words):
                model(**batch)


def test_a_backend_that_was_chosen_stays() -> None:
    model = tiny("bert")
    rk.patch(model, backend="pytorch")
    traced, program = jit(model, batches(0)[0]), exported(model, batches(0)[2])
    gives_the_models_bits(model, traced, 0)
    gives_the_models_bits(model, saved(program), 0)
    assert "pytorch" in str(traced.inlined_graph) and "'pytorch'" in str(program.graph_module.print_readable(False))
    with pytest.raises(Exception, match="strict=False"):
        exported(model, batches(0)[2], strict=True)


def test_a_leaf_of_a_loaded_graph_may_ask_for_gradients() -> None:
    """TorchScript forgets that weights are Parameters; a result has no gradient all the same, with or without no_grad()."""
    loaded, (first, *_) = saved(jit(patched(), batches(0)[0])), batches(0)
    assert any(p.requires_grad for p in loaded.parameters())
    assert torch.is_grad_enabled() and not loaded(**first)["logits"].requires_grad


FRESH = """
import sys
{imports}
kind, folder = sys.argv[1:]
batches, want = torch.load(folder + "/batches.pt")
graph = torch.jit.load(folder + "/graph") if kind == "jit" else torch.export.load(folder + "/graph.pt2").module()
for batch, logits in zip(batches, want, strict=True):
    got = graph(*batch.values())
    assert torch.equal(got.view(torch.int32), logits.view(torch.int32)), (got, logits)
print("the same")
"""


@pytest.mark.parametrize(
    ("kind", "imports"),
    [("jit", "import rerank_kernels, torch"), ("export", "import torch, rerank_kernels")],
)
def test_in_a_process_that_has_imported_the_package(tmp_path: Path, kind: str, imports: str) -> None:
    model = patched()
    given = batches(0)
    torch.save((given, [model(**batch).logits for batch in given]), tmp_path / "batches.pt")
    if kind == "jit":
        torch.jit.save(torch.jit.trace(Logits(model), tuple(given[0].values())), tmp_path / "graph")
    else:
        sizes = {0: torch.export.Dim("B"), 1: torch.export.Dim("T")}
        program = torch.export.export(Logits(model), tuple(given[2].values()), dynamic_shapes=(sizes, sizes))
        torch.export.save(program, tmp_path / "graph.pt2")
    fresh = FRESH.format(imports=imports)
    done = subprocess.run([sys.executable, "-c", fresh, kind, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "the same\n"), done.stderr


def test_adapters() -> None:
    """Those that are active while it is traced; and their sum is an op, which no compiler can fuse."""
    model = lora.adapted(tiny("bert"), ("query", "value"), saves=True)
    rk.patch(model)
    inner = model.base_model.model
    traced = jit(inner, batches(0)[0])
    gives_the_models_bits(inner, traced, 0)
    assert str(traced.inlined_graph).count("rerank_kernels_compiled::added") == 4 and "aten::mul(" not in str(
        traced.inlined_graph
    )


# ---- decoders ---------------------------------------------------------------------------------------------------------------


def patched_decoder(kind: str, cls: str, **changes: Any) -> Any:
    model = decoder(kind, cls=cls, use_cache=False, **changes)
    rk.patch(model)
    return model


@pytest.mark.parametrize(
    ("kind", "cls"),
    [
        ("llama", "ForSequenceClassification"),
        ("mistral", "Model"),
        ("qwen3", "ForCausalLM"),
        ("gemma", "ForSequenceClassification"),
        ("phi3", "ForSequenceClassification"),
        ("gemma2", "Model"),
        ("gemma3", "ForCausalLM"),
    ],
)
def test_decoders(kind: str, cls: str) -> None:
    model = patched_decoder(kind, cls)
    traced = jit(model, batches(0)[0])
    gives_the_models_bits(model, traced, 0)
    if kind == "llama":
        gives_the_models_bits(model, saved(traced), 0)
        gives_the_models_bits(model, saved(exported(model, batches(0)[2])), 0)
        gives_the_models_bits(model, exported(model, batches(0)[2], strict=True).module(), 0)


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [1.5] * 8, "factor": 8.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def test_angles_that_depend_on_the_length() -> None:
    """A short row is traced; a longer one beside it has angles of its own."""
    model = patched_decoder("llama", "ForSequenceClassification", rope_parameters=LONGROPE)
    first, *_ = batches(0)
    for f in (jit(model, first), exported(model, batches(0)[2]).module()):
        for lengths in ((9, 5), (40, 9, 17), (16,)):
            batch = padded(rows(lengths, 5), 0)
            same(tensors(f(**batch))[0], model(**batch).logits, f"lengths {lengths}")
        with pytest.raises(Exception, match="input_ids must be at most 256 tokens"):
            f(**padded(rows((257, 3)), 0))


def test_a_cache_is_refused() -> None:
    model = decoder("llama", cls="ForCausalLM")
    rk.patch(model)
    refused = r"^LlamaForCausalLM\.forward: a cache cannot be traced or exported; pass use_cache=False, or set model\.config"
    with pytest.raises(PatchError, match=refused):
        jit(model, batches(0)[0])
    with pytest.raises(Exception, match=refused.removeprefix("^")):
        exported(model, batches(0)[2])
    model.config.use_cache = False
    gives_the_models_bits(model, jit(model, batches(0)[0]), 0)


# ---- leaves and ops ---------------------------------------------------------------------------------------------------------


def test_leaves_in_a_container() -> None:
    model = nn.Sequential(
        nn.Linear(12, 8), nn.LayerNorm(8), nn.GELU(), nn.LayerNorm(8, elementwise_affine=False), nn.Softmax(-1)
    )
    rk.patch(model.eval())
    x = [numbers(f"x{n}", (n, 5, 12), torch.float32) for n in (1, 2, 7)]
    sizes = ({0: torch.export.Dim("B")},)
    programs = [torch.export.export(model, (x[1],), dynamic_shapes=sizes, strict=strict).module() for strict in (False, True)]
    for f in (torch.jit.trace(model, x[0]), *programs, torch.fx.symbolic_trace(model)):
        for one in x:
            same(f(one), model(one), "traced leaves")


@pytest.mark.parametrize("include_prompt", [True, False])
def test_sentence_modules(include_prompt: bool) -> None:
    model = nn.Sequential(systems.Pooling("mean", include_prompt), systems.Normalize()).eval()
    rk.patch(model)

    class Embedder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor, mask: Tensor, prompt: Tensor) -> Tensor:
            made: Tensor = self.inner({"token_embeddings": x, "attention_mask": mask, "prompt_length": prompt})[
                "sentence_embedding"
            ]
            return made

    given = []
    for b, t, prompt in ((2, 6, 1), (1, 6, 3), (4, 9, 2)):
        mask = (torch.arange(t) < torch.arange(t, t - b, -1)[:, None]).long()
        given.append((numbers(f"x{b}", (b, t, 16), torch.float32), mask, torch.tensor([prompt])))
    whole, sizes = Embedder().eval(), {0: torch.export.Dim("B"), 1: torch.export.Dim("T")}
    program = torch.export.export(whole, given[0], dynamic_shapes=(sizes, sizes, None))
    for f in (torch.jit.trace(whole, given[0]), program.module()):
        for one in given:
            same(f(*one), whole(*one), "traced pooling")


class OneOp(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.names = case, list(arguments(case, torch.float32))

    def forward(self, *tensors: Tensor) -> Any:
        return cases.FUNCTIONS[self.case.op](**dict(zip(self.names, tensors, strict=True)), **self.case.options)


@pytest.mark.parametrize("own", CASES, ids=str)
def test_ops(own: Case) -> None:
    """Each op by every tracer, written down with 29 rows and run with others."""
    given = [tuple(arguments(own, torch.float32, total).values()) for total in (29, 11, 23)]
    model = OneOp(own)
    changing = tuple(
        {d: torch.export.Dim.AUTO for d, (n, m) in enumerate(zip(one.shape, other.shape, strict=True)) if n != m}
        for one, other in zip(*given[:2], strict=True)
    )
    program = torch.export.export(model, given[0], dynamic_shapes=(changing,))
    for f in (torch.jit.trace(model, given[0]), program.module()):
        for one in given:
            all_same(outputs(f(*one)), outputs(model(*one)), f"{own}, {one[0].shape[0]} rows")


def test_symbolic_trace_of_ops() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        head = rk.score_head(rk.softmax(rk.linear(x, w, activation="gelu") * 2.0), w[:3, :5])
        return head.logit + head.complement

    x, w = numbers("x", (6, 7), torch.float32), numbers("w", (5, 7), torch.float32)
    graph = torch.fx.symbolic_trace(f)
    for one in (x, x[:1]):
        same(graph(one, w), f(one, w), "symbolically traced")
    for mode in ("real", "symbolic"):
        made = torch.fx.experimental.proxy_tensor.make_fx(f, tracing_mode=mode)(x, w)
        same(made(x, w), f(x, w), f"make_fx, {mode}")


# ---- refused ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [patched, lambda: bare(nn.Linear(3, 2)), lambda: bare(nn.Sequential(nn.Softmax(-1)))[0]])
def test_what_reads_the_source_of_the_class_is_refused(made: Callable[[], Any]) -> None:
    """It would find the stock forward there. The advice is taken, too."""
    model = made()
    name = type(model).__name__
    for tracer in (torch.jit.script, torch.fx.symbolic_trace):
        with pytest.raises(
            PatchError, match=rf"^{name}: torch\.[\w.]+ reads the source .* torch\.jit\.trace\(\) take it"
        ) as refused:
            tracer(model)
        assert "\n" not in str(refused.value)
    assert repr(model).startswith(name)
    rk.unpatch(model)
    if isinstance(model, nn.Linear):
        x = torch.ones(2, 3)
        assert torch.equal(torch.jit.script(model)(x), model(x)) and torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


def bare(model: Any) -> Any:
    rk.patch(model.eval())
    return model


def test_script_is_refused_wherever_it_finds_ours() -> None:
    with pytest.raises(PatchError, match=r"^Linear: torch\.jit\.script reads"):
        torch.jit.script(bare(nn.Sequential(nn.Linear(3, 2))))

    class Calls(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return rk.softmax(x)

    with pytest.raises(RuntimeError, match=r"softmax cannot be scripted: .* take torch\.jit\.trace\(\) instead"):
        torch.jit.script(Calls())
    assert torch.jit.trace(Calls(), torch.ones(1, 3))(torch.ones(2, 3)).shape == (2, 3)


def test_fx_inside_an_encoder_is_refused() -> None:
    class Around(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: Tensor) -> Any:
            return self.inner(ids)[0] * 2

    with pytest.raises(
        PatchError, match=r"^BertForSequenceClassification.forward: .* torch\.fx\.symbolic_trace has none; .* take it"
    ):
        torch.fx.symbolic_trace(Around(patched()))


def test_onnx_is_refused(tmp_path: Path) -> None:
    batch = batches(0)[0]
    for model, words in ((patched(), "BertForSequenceClassification.forward"), (OneOp(CASES[0]), CASES[0].op)):
        given = tuple(arguments(CASES[0], torch.float32).values()) if isinstance(model, OneOp) else tuple(batch.values())
        with pytest.raises(RuntimeError, match=rf"^{words}: ONNX has no operators with these bits; .* rk\.unpatch\(model\)"):
            torch.onnx.export(model, given, str(tmp_path / "model.onnx"), dynamo=False)
    leaf = bare(nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(RuntimeError, match=r"^Linear\.forward: ONNX"):
        torch.onnx.export(leaf, (torch.ones(1, 3),), str(tmp_path / "leaf.onnx"), dynamo=False)
    rk.unpatch(leaf)
    try:
        torch.onnx.export(leaf, (torch.ones(1, 3),), str(tmp_path / "leaf.onnx"), dynamo=False)
    except torch.onnx.OnnxExporterError as error:
        assert "Module onnx is not installed" in str(error), "it was exported, and only cannot be written"


def test_inside_a_module_of_the_users() -> None:
    model = patched()
    whole, (first, _, wide, *_) = Logits(model).eval(), batches(0)
    sizes = {0: torch.export.Dim("B"), 1: torch.export.Dim("T")}
    program = torch.export.export(whole, tuple(wide.values()), dynamic_shapes=(sizes, sizes))
    gives_the_models_bits(model, program.module(), 0, by_place=True)
    with torch.inference_mode():
        gives_the_models_bits(model, torch.jit.trace(whole, tuple(first.values())), 0, by_place=True)
    with pytest.raises(PatchError, match=r"^BertForSequenceClassification: torch\.jit\.script"):
        torch.jit.script(whole)


def test_the_mode_of_the_model_around_is_written_down() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as fakes, modes.of_the_model(modes.TENSOR):
        x = fakes.from_tensor(torch.ones(2, 4, dtype=torch.float16))
        made = torch.fx.experimental.proxy_tensor.make_fx(lambda x: rk.linear(x, x))(x)
    assert "mode = 'tensor'" in made.code
    assert "mode = 'portable'" in torch.fx.experimental.proxy_tensor.make_fx(lambda x: rk.linear(x, x))(torch.ones(2, 4)).code


def odd(self: Any, input_ids: Tensor, attention_mask: Tensor) -> None: ...


CHANGES: dict[str, Callable[[Any], Any]] = {
    "scaling must be": lambda m: setattr(m.bert.encoder.layer[0].attention.self, "scaling", 0.01),
    "has forward hooks": lambda m: m.bert.encoder.layer[0].register_forward_hook(lambda *_: None),
    "has a forward of its own": lambda m: setattr(m.bert.encoder.layer[0], "forward", lambda *_, **__: None),
    "is of class Odd now": lambda m: setattr(m, "__class__", type("Odd", (type(m),), {"forward": odd})),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("words", CHANGES)
def test_what_came_after_patch_is_seen_while_it_is_exported(words: str, strict: bool) -> None:
    model = patched()
    CHANGES[words](model)
    with pytest.raises(PatchError, match=words):
        exported(model, batches(0)[2], strict=strict)
    with pytest.raises(PatchError, match=words):
        jit(model, batches(0)[0])


def test_a_look_that_is_not_taken_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_looked", lambda *_: True)
    with pytest.raises(pytest.fail.Exception):
        test_what_came_after_patch_is_seen_while_it_is_exported("scaling must be", True)


# ---- what unpatch and copies make of it -------------------------------------------------------------------------------------


def test_a_copy_is_refused_and_traced_like_the_model() -> None:
    import copy
    import pickle

    model = patched()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        gives_the_models_bits(model, jit(twin, batches(0)[0]), 0)
        assert vars(twin)["_get_name"].forward is vars(twin)["forward"]
        with pytest.raises(PatchError):
            torch.fx.symbolic_trace(twin)


# ---- controls ---------------------------------------------------------------------------------------------------------------


def test_a_mask_that_is_looked_at_while_it_is_traced_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The defect that this file is about: the tokens of the traced row are baked in."""
    monkeypatch.setattr(packing, "traced", lambda: False)
    warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
    with pytest.raises(Exception):  # noqa: B017  whichever comes first: PyTorch's own error, or other bits
        test_jit_trace("bert", True)


def test_angles_that_are_made_while_it_is_traced_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the traced row's length would serve every other."""
    monkeypatch.setattr(decoders, "traced", lambda: False)
    warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
    with pytest.raises(Exception):  # noqa: B017  as above
        test_angles_that_depend_on_the_length()


def test_stock_arithmetic_in_a_graph_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracer that reads the class gets the stock forward: other bits."""
    model = patched()
    stock = tiny("bert")
    with pytest.raises(AssertionError):
        gives_the_models_bits(model, lambda **batch: tuple(stock(**batch).values()), 0)


def test_a_lost_backend_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opaque.registry, "asked", lambda: None)
    with pytest.raises(AssertionError):
        test_a_backend_that_was_chosen_stays()


def test_a_split_by_the_traced_length_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by bits: tokens are on their own. But PyTorch warns of the branch, and the warning is an error here."""
    monkeypatch.setattr(bert, "traced", lambda: False)
    with pytest.raises(SystemError):  # what Python makes of a warning that is an error inside PyTorch's C++
        jit(patched(), batches(0)[0])


def test_without_the_hooks_fx_gets_the_stock_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bound, "symbolic", lambda: False)
    model = bare(nn.Softmax(-1))
    graph = torch.fx.symbolic_trace(model)
    assert "rerank_kernels" not in graph.code
