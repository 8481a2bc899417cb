"""Token ids: those of the tokenizer's own call, in memory that grows with the texts and not with their product."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_bounding import PIECES, unigram, wordpiece

import models
import rerank_kernels as rk
from commands import environment
from rerank_kernels.scoring import tokenising


def _changed(make: Callable[[], Any], change: Callable[[Any], None]) -> Callable[[], Any]:
    def made() -> Any:
        tokenizer = make()
        change(tokenizer)
        return tokenizer

    return made


def _post(name: str) -> Callable[[Any], None]:
    """Another post-processor: the five kinds that there are."""

    def change(tokenizer: Any) -> None:
        from tokenizers import processors as p

        ends = ("</s>", 2), ("<s>", 0)
        tokenizer.backend_tokenizer.post_processor = {
            "none": lambda: None,
            "bert": lambda: p.BertProcessing(*ends),
            "roberta": lambda: p.RobertaProcessing(*ends),
            "bytes": lambda: p.ByteLevel(),
            "sequence": lambda: p.Sequence([p.ByteLevel(), p.RobertaProcessing(*ends)]),
            "behind": lambda: p.TemplateProcessing(
                single="$A:3 </s>:4 <s>:5", pair="$B:1 $A:2 </s>:0", special_tokens=[("<s>", 0), ("</s>", 2)]
            ),
            "twice": lambda: p.TemplateProcessing(single="$A $A", pair="$A </s> $B $A", special_tokens=[("</s>", 2)]),
        }[name]()

    return change


def _normaliser(tokenizer: Any) -> None:
    """One that shrinks and expands, and added tokens that take their spaces with them."""
    from tokenizers import AddedToken, normalizers

    steps = [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(), normalizers.Replace("a", "aaa")]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.add_tokens([AddedToken("flour", lstrip=True, rstrip=True), AddedToken("two words", single_word=True)])


def _typed(tokenizer: Any) -> None:
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]


def roberta() -> Any:
    return models.tokenizer("roberta")


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "wordpiece": wordpiece,
    "unigram": unigram,
    "bpe, bert": lambda: models.tokenizer("bert"),
    "bpe, roberta": roberta,
    "left": _changed(wordpiece, lambda t: setattr(t, "truncation_side", "left")),
    "unigram, left": _changed(unigram, lambda t: setattr(t, "truncation_side", "left")),
    "special tokens split": _changed(roberta, lambda t: setattr(t, "split_special_tokens", True)),
    "cut and filled before": _changed(
        roberta, lambda t: (t.backend_tokenizer.enable_truncation(9), t.backend_tokenizer.enable_padding(length=40))
    ),
    "normaliser": _changed(roberta, _normaliser),
    **{name: _changed(_changed(roberta, _typed), _post(name)) for name in ("none", "bert", "roberta", "bytes", "sequence")},
    "behind": _changed(_changed(roberta, _typed), _post("behind")),
    "twice": _changed(_changed(roberta, _typed), _post("twice")),
}


def texts(draw: random.Random, count: int) -> list[str]:
    found = ["", "a", "a b", "w " * 9, "x" * 40]  # short: the tokenizer's own call takes the product of their lengths
    for _ in range(count):
        weights = [draw.choice((0.1, 1.0, 9.0)) for _ in PIECES]
        found.append(draw.choice(("", " ")).join(draw.choices(PIECES, weights, k=draw.choice((1, 3, 9)))))
    return found


def own(tokenizer: Any, first: list[str], second: list[str] | None, max_length: int) -> dict[str, Any]:
    """The tokenizer's own call."""
    return dict(tokenizer(first, second, truncation=True, max_length=max_length, padding=False))


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "twice"])  # whose own call takes all memory
def test_ids_are_those_of_the_tokenizers_own_call(name: str) -> None:
    draw = random.Random(len(name))
    ours = TOKENIZERS[name]()
    theirs = copy.deepcopy(ours)
    pairs = [(a, b) for a in texts(draw, 9) for b in texts(draw, 4)]
    for max_length in (6, 7, 16, 17, 64):
        for columns in (tuple(map(list, zip(*pairs, strict=True))), ([a for a, _ in pairs], None)):
            want = own(theirs, *columns, max_length)
            ids, types = tokenising.tokenise(ours, *columns, max_length)
            assert [i.tolist() for i in ids] == want["input_ids"]
            assert (None if types is None else [t.tolist() for t in types]) == want.get("token_type_ids")


def test_which_are_put_together_here(monkeypatch) -> None:
    """All but templates that give the texts in another order or twice; these are called as they are."""
    called = []
    monkeypatch.setattr(tokenising, "_called", lambda *args: called.append(args) or ([], None))
    for name, make in TOKENIZERS.items():
        tokenising.tokenise(make(), ["a"], ["b"], 16)
        assert bool(called) == (name in ("behind", "twice")), name
        called.clear()


@pytest.mark.parametrize("strange", ["class", "instance", "slow"])
def test_a_tokenizer_of_another_kind_is_called_as_it_is(strange: str) -> None:
    tokenizer = models.tokenizer("bert")
    want = own(tokenizer, ["a b c"] * 3, ["d e"] * 3, 8)["input_ids"]
    calls = []

    class Other(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            return super().__call__(*args, **kwargs)

    if strange == "class":
        tokenizer.__class__ = Other
    elif strange == "instance":
        tokenizer._encode_plus = lambda *a, **k: calls.append(a) or type(tokenizer)._encode_plus(tokenizer, *a, **k)
    else:
        fast = tokenizer

        def tokenizer(*args: Any, **kwargs: Any) -> Any:  # type: ignore[no-redef]
            calls.append(args)
            return fast(*args, **kwargs)

    ids, types = tokenising.tokenise(tokenizer, ["a b c"] * 3, ["d e"] * 3, 8)
    assert calls and [i.tolist() for i in ids] == want and types is not None and len(types) == 3


@pytest.mark.parametrize(
    "cut",
    [
        lambda a, b, room: (min(a, room - room // 2), min(b, room // 2)),  # halves, though the other text is short
        lambda a, b, room: tuple(reversed(tokenising_cut(b, a, room))) if a == b else tokenising_cut(a, b, room),  # ties
        lambda a, b, room: tokenising_cut(a, b, room - 1),
    ],
)
def test_the_test_would_see_another_rule(monkeypatch, cut) -> None:
    monkeypatch.setattr(tokenising, "cut", cut)
    with pytest.raises(AssertionError):
        test_ids_are_those_of_the_tokenizers_own_call("wordpiece")


tokenising_cut = tokenising.cut


def test_slices_change_nothing(monkeypatch) -> None:
    tokenizer = wordpiece()
    first, second = ["a b c", "", "d" * 50] * 5, ["e", "f g", "h i"] * 5
    want = [i.tolist() for i in tokenising.tokenise(tokenizer, first, second, 9)[0]]
    for size, count in ((1, 1), (40, 2), (100, 3)):
        monkeypatch.setattr(tokenising, "SLICE", size)
        monkeypatch.setattr(tokenising, "TEXTS", count)
        assert [i.tolist() for i in tokenising.tokenise(tokenizer, first, second, 9)[0]] == want
        assert [i.tolist() for i in tokenising._called(tokenizer, first, second, 9)[0]] == want


def test_threads_and_their_own_calls_go_together() -> None:
    """Who tokenises with the same tokenizer beside us keeps what was set for that call."""
    tokenizer = wordpiece()
    want = tokenising.tokenise(tokenizer, ["a b c d"] * 20, ["e f"] * 20, 8)[0]
    errors = []

    def work() -> None:
        for _ in range(20):
            got = tokenising.tokenise(tokenizer, ["a b c d"] * 20, ["e f"] * 20, 8)[0]
            if not all(np.array_equal(a, b) for a, b in zip(got, want, strict=True)):
                errors.append(got)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


# ---- memory ------------------------------------------------------------------------------------------------------------------

LONG = {
    "a pair of words": ("['word ' * 20_000]", "['text ' * 20_000]", 512),  # the tokenizer's own call: 2.1 GB
    "rank of 60": ("['word ' * 2_000] * 60", "[f'{i} ' * 20_000 for i in range(60)]", 512),  # 5.2 GB
    "letters": ("['é' * 40_000]", "['ü' * 40_000]", 7),  # more than there is: the process is ended
}
PEAK = f"""
import re, sys
sys.path[:0] = {[p for p in sys.path if p]!r}
import models
from test_bounding import wordpiece
from rerank_kernels.scoring import tokenising

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024

bytes_each, words = models.tokenizer("bert"), wordpiece()
for own in (bytes_each, words):
    tokenising.tokenise(own, ["a"], ["b"], 64)
for first, second, length in [{", ".join(f"({a}, {b}, {n})" for a, b, n in LONG.values())}]:
    before = peak()
    tokenising.tokenise(bytes_each if length == 7 else words, first, second, length)
    print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_memory_does_not_grow_with_the_product() -> None:
    ran = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, env=environment())
    assert ran.returncode == 0, ran.stderr[-500:]
    took = dict(zip(LONG, map(int, ran.stdout.split()), strict=True))
    print(took)
    assert all(megabytes < 150 for megabytes in took.values()), took


# ---- what no model can look up, and panics -----------------------------------------------------------------------------------


def test_ids_beyond_the_vocabulary_are_an_error(tmp_path) -> None:
    tokenizer = models.tokenizer("bert")
    small = rk.Reranker(models.tiny("bert", vocab_size=20), tokenizer)
    with pytest.raises(
        ValueError, match=r"ids of the tokenizer must be below 20, config\.json's vocab_size, got \d+ in text 1"
    ):
        small.score([("", ""), ("", "text")])
    one = rk.Reranker(models.tiny("bert", vocab_size=len(tokenizer), type_vocab_size=1), tokenizer)
    with pytest.raises(ValueError, match="token types of the tokenizer must be below 1, config"):
        one.score([("a", "b")])


def test_numbers_of_32_bits_are_an_error_too() -> None:
    """The tokenizers library counts ids and types without a sign."""
    from tokenizers import processors

    tokenizer = models.tokenizer("bert")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A:0 [SEP]:0 $B:4294967295", special_tokens=[("[SEP]", tokenizer.sep_token_id)]
    )
    reranker = rk.Reranker(models.tiny("bert", vocab_size=len(tokenizer)), tokenizer)
    with pytest.raises(ValueError, match=r"token types of the tokenizer must be below 2, .*, got 4294967295 in text 0"):
        reranker.score([("a", "b")])


def test_a_regular_expression_that_panics_is_an_error() -> None:
    from tokenizers import Regex, pre_tokenizers

    tokenizer = models.tokenizer("bert")
    hostile = pre_tokenizers.Split(Regex("(a|a|aa)+$"), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([hostile, pre_tokenizers.ByteLevel()])
    reranker = rk.Reranker(models.tiny("bert", vocab_size=len(tokenizer)), tokenizer)
    good = reranker.score([("a", "b")]).logit
    with pytest.raises(ValueError, match=r"the tokenizer cannot read these texts: .*retry-limit"):
        reranker.score([("a", "a" * 5_000 + "b")])
    assert reranker.score([("a", "b")]).logit.tobytes() == good.tobytes()
