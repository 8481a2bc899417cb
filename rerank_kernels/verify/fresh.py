"""Fresh processes: the same calls in another Python, and what a user reads in the end under other settings of the process.

MKL and PyTorch choose their kernels when they start, by the CPU and by the environment: what is ours has the same bits whatever
they chose.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rerank_kernels.backend import registry
from rerank_kernels.models.registry import packed_answers
from rerank_kernels.models.sentence import stock_pooling
from rerank_kernels.ops.pooling import pool
from rerank_kernels.patching import walk
from rerank_kernels.scoring.language import next_logits, writes
from rerank_kernels.scoring.reranker import Reranker
from rerank_kernels.verify.checks import HOME, SETTINGS, Call, Floats, Inputs, Runner, Texts, Tokens, all_checks, build
from rerank_kernels.verify.controls import Control, one_ulp_off
from rerank_kernels.verify.models import load
from rerank_kernels.verify.report import Setting


def scores(model: nn.Module) -> bool:
    """Whether it has a classification head."""
    return type(model).__name__.endswith("ForSequenceClassification")


def runner_of(model: nn.Module, pooling: str, stock: bool) -> Runner:
    """inputs -> float32 [B, L]: the logits, or the vectors pooled as a user of that system would pool them."""

    def runner(inputs: Inputs) -> Tensor:
        if writes(model):
            return next_logits(model, inputs)
        with torch.inference_mode():
            out = model(**inputs)
            if scores(model):
                return out.logits.float()
            hidden: Tensor = out.last_hidden_state
            mask = inputs.get("attention_mask")
            mask = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device) if mask is None else mask
            if stock:
                return stock_pooling(hidden, mask, pooling).float()
            return pool(hidden, pooling, mask=mask, out_dtype=torch.float32)

    return runner


def request_for(
    source: str,
    model: nn.Module,
    pooling: str,
    stock: bool,
    setting: Setting,
    trusted: bool = False,
    answers: tuple[int, int | None] | None = None,
) -> dict[str, Any]:
    """What a fresh process needs to have the same model."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    where = {"mode": setting.mode, "device": str(setting.device)}
    what = {"source": source, "trusted": trusted, "dtype": dtype, "pooling": pooling, "stock": stock, "answers": answers}
    return what | where


def _ask(request: dict[str, Any], setting: Setting, variable: str = "") -> list[Floats]:
    """The answers of another Python, in whose environment is NAME=VALUE, if given."""
    program = "from rerank_kernels.verify.fresh import serve_parent; serve_parent()"
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, registry.ENVIRONMENT: setting.backend.name, "PYTHONPATH": path}
    if variable:
        name, _, environment[name] = variable.partition("=")
    ran = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(request), capture_output=True, text=True, env=environment
    )
    if ran.returncode:
        raise RuntimeError(f"verify: the fresh process failed with {ran.returncode}: {ran.stderr.strip()[-2000:]}")
    answers = json.loads(ran.stdout.splitlines()[-1])
    return [np.frombuffer(bytes.fromhex(bits), np.float32).reshape(shape) for shape, bits in answers]


class FreshProcess:
    """Asks another Python for all its calls at once, the first time it is asked for one."""

    def __init__(self, request: dict[str, Any], setting: Setting, texts: Texts, few: int) -> None:
        self.request, self.setting, self.texts, self.few = request, setting, texts, few
        self.answers: dict[tuple[int, ...], Floats] = {}

    def answer(self, call: Call) -> Floats:
        if not self.answers:
            check = next(c for c in all_checks(self.texts, routes=("process",), few=self.few) if c.name == "process")
            batches = [c.rows for s in check.scorings for c in s]
            inputs = [_listed(build(self.texts, Call(b))) for b in batches]
            self.answers = dict(zip(batches, _ask({**self.request, "inputs": inputs}, self.setting), strict=True))
        return self.answers[call.rows]


class Finals:
    """What a user reads of the first rows, here and in a fresh process for each of SETTINGS; two at a time if small."""

    def __init__(self, request: dict[str, Any], setting: Setting, model: nn.Module, texts: Texts, few: int) -> None:
        self.request, self.setting, self.model, self.texts = request, setting, model, texts
        self.at_once = 2 if few > 2 * HOME else 1
        self.answers: dict[str, Floats] = {}
        self.mutant: Floats | None = None

    def answer(self, call: Call) -> Floats:
        inputs, tokens = build(self.texts, Call(call.rows), self.setting.device), [self.texts.tokens[r] for r in call.rows]
        if not call.setting:
            pooling, stock, answers = (self.request[name] for name in ("pooling", "stock", "answers"))
            self.answers[""] = _final(self.model, pooling, stock, inputs, tokens, answers)
        elif call.setting not in self.answers:
            request = {**self.request, "inputs": [_listed(inputs)], "tokens": tokens}

            def ask(variable: str) -> list[Floats]:
                wrong = _rooted(self.model) if variable == SETTINGS[0] and not self.request["stock"] else None
                return _ask({**request, "setting": variable, "wrong": wrong}, self.setting, variable)

            with ThreadPoolExecutor(self.at_once) as pool:
                found = dict(zip(SETTINGS, pool.map(ask, SETTINGS), strict=True))
            self.answers |= {variable: right for variable, (right, *_) in found.items()}
            self.mutant = found[SETTINGS[0]][-1]
        return self.answers[call.setting]

    def control(self) -> Control:
        """What torch.sqrt does there on some rows, done on all: caught only where the very last numbers are compared."""
        assert self.mutant is not None
        caught = self.mutant.tobytes() != self.answers[""].tobytes()
        name = f"{_rooted(self.model)} 1 ulp off under {SETTINGS[0]}"
        return Control(name, "math library", ("math library",) if caught else ())


def _rooted(model: nn.Module) -> str:
    """The last op with a square root on the way to what a user reads."""
    if not (scores(model) or writes(model)):
        return "normalize"
    return "rms_norm" if any(type(m).__name__.endswith("RMSNorm") for m in model.modules()) else "layer_norm"


class _Given:
    """In a tokenizer's place: the text "3" has the tokens of row 3. What is promised begins at token ids."""

    model_max_length = 1 << 30

    def __init__(self, tokens: Sequence[Tokens]) -> None:
        self.tokens = tokens

    def num_special_tokens_to_add(self, pair: bool) -> int:
        return 0

    def __call__(self, first: list[str], *_: Any, **__: Any) -> dict[str, list[list[int]]]:
        rows = [self.tokens[int(text)] for text in first]
        return {name: [row[name] for row in rows] for name in rows[0]}


def _final(
    model: nn.Module,
    pooling: str,
    stock: bool,
    inputs: Inputs,
    tokens: Sequence[Tokens],
    answers: tuple[int, int | None] | None = None,
) -> Floats:
    """float32 [B, L]: logit, score and complement of a pair. Of a text: its embedding of length 1, its cosine with the first
    text's, and 1 - cosine; or the next token's logits. Ours by the Reranker, stock's of one padded batch."""
    if writes(model):
        if answers is None:
            return next_logits(model, inputs).cpu().numpy()
        if stock:
            made = next_logits(model, inputs)
            logit = (made[:, answers[0]] - (0 if answers[1] is None else made[:, answers[1]]))[:, None]
            return torch.cat([logit, logit.sigmoid(), (-logit).sigmoid()], 1).cpu().numpy()
        packed = [one["input_ids"] for one in tokens]
        cu = torch.tensor([0, *np.cumsum([len(ids) for ids in packed])], dtype=torch.int32)
        flat = torch.tensor([token for ids in packed for token in ids])
        device = inputs["input_ids"].device
        with torch.inference_mode():
            return torch.cat(packed_answers(model, flat.to(device), cu.to(device), *answers), 1).cpu().numpy()
    if stock:
        with torch.inference_mode():
            made = runner_of(model, pooling, stock)(inputs)
            if scores(model):
                return torch.cat([made, made.sigmoid(), (-made).sigmoid()], 1).cpu().numpy()
            made = F.normalize(made, dim=-1)
            cosine = (made * made[:1]).sum(-1, keepdim=True)
            return torch.cat([made, cosine, 1.0 - cosine], 1).cpu().numpy()
    if scores(model) and model.config.num_labels != 1:  # type: ignore[union-attr]
        return runner_of(model, pooling, stock)(inputs).cpu().numpy()
    reranker, texts = Reranker(model, _Given(tokens)), [str(row) for row in range(len(tokens))]
    if reranker.kind == "cross-encoder":
        return np.stack(reranker.score([(text, "") for text in texts], progress=False), axis=1)
    reranker.pooling = pooling
    cosines = reranker.score([(texts[0], text) for text in texts], progress=False)
    return np.concatenate([reranker.encode(texts, progress=False), np.stack((cosines.logit, cosines.complement), axis=1)], 1)


def _listed(inputs: Inputs) -> dict[str, Any]:
    return {name: t.tolist() for name, t in inputs.items()}


def serve_parent() -> None:
    """The fresh process: a request on stdin, the bits of the answers on stdout."""
    request = json.load(sys.stdin)
    model = load(request["source"], getattr(torch, request["dtype"]), request["trusted"]).model
    model.to(request["device"])
    pooling, stock = request["pooling"], request["stock"]
    if not stock:
        walk.patch(model, request["mode"])
    if not request.get("setting", "").startswith("OMP_NUM_THREADS"):
        torch.set_num_threads(1)
    given = [{n: torch.tensor(v, device=request["device"]) for n, v in one.items()} for one in request["inputs"]]
    if "tokens" not in request:
        runner = runner_of(model, pooling, stock)
        answers = [runner(one).cpu().numpy() for one in given]
    else:
        final = functools.partial(_final, model, pooling, stock, given[0], request["tokens"], request["answers"])
        answers = [final()]
        if request["wrong"]:
            with one_ulp_off(request["wrong"]):
                answers.append(final())
    print(json.dumps([(a.shape, a.tobytes().hex()) for a in answers]))
