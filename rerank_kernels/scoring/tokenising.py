"""From texts to token ids: those that the tokenizer's own call gives, in memory that does not grow with query times document.

A call of a fast tokenizer with truncation keeps what it cut off. Of a pair it keeps each piece of the first text with each
piece of the second: two texts of 40,000 letters need more memory than there is, and the process is ended. So each text is
tokenised alone, cut to its ids of the pair, and put between the special tokens here.

The ids are the same, for the tokenizer does these steps in this order too:
- It tokenises the two texts of a pair apart; nothing in one changes an id of the other.
- It then cuts them by their numbers of ids alone. `cut` is its rule, longest_first.
- Its post-processor then puts special tokens before, between and behind, whatever the ids are. There are five kinds of
  post-processors, and each does so. Where they stand, and every token's type, is read off pairs of short texts.

A tokenizer for which that is not known is called as it is, a slice of texts at a time: one without a Rust backend, or one whose
class changes the call.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rerank_kernels import check

Ids = npt.NDArray[np.int64]
SLICE = 1 << 20  # characters that are tokenised at a time, or one longer text
TEXTS = 1 << 10
_PROBES = ("a", "the", "1", ".", "?", "to be")  # some of these have an id in any vocabulary
_CALL = ("__call__", "_call_one", "_encode_plus", "_batch_encode_plus", "set_truncation_and_padding", "_convert_encoding")
_ONLY_ASSERT = (
    "RobertaTokenizerFast",
    "GPT2TokenizerFast",
)  # transformers 4: their calls refuse one option, and go on as usual

# A fast tokenizer sets truncation on itself for each call: two threads at once give "Already borrowed".
LOCK = threading.Lock()
around: Callable[[], AbstractContextManager[None]] = nullcontext  # the command line's, for what Rust prints of a panic
if hasattr(os, "register_at_fork"):  # a thread that is not in the child may have held it
    os.register_at_fork(after_in_child=LOCK._at_fork_reinit)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Surround:
    """What stands around the ids: ids and types of the special tokens before the first text, between the texts, and behind."""

    special: tuple[tuple[Ids, Ids], ...]  # one more than there are texts
    types: tuple[int, ...]  # of each text's own tokens

    @property
    def count(self) -> int:
        return sum(len(ids) for ids, _ in self.special)

    def around(self, texts: Sequence[Ids]) -> tuple[Ids, Ids]:
        """(ids, types) of the whole."""
        ids, types = [self.special[0][0]], [self.special[0][1]]
        for own, kind, (after, after_types) in zip(texts, self.types, self.special[1:], strict=True):
            ids += [own, after]
            types += [np.full(len(own), kind, np.int64), after_types]
        return np.concatenate(ids), np.concatenate(types)


def cut(first: int, second: int, room: int) -> tuple[int, int]:
    """How many ids of each text are kept, of so many, where `room` are: the tokenizers library's longest_first."""
    if first + second <= room:
        return first, second
    short, long = sorted((first, second))
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short = room // 2
        long = short + room % 2
    return (long, short) if first > second else (short, long)


def tokenise(
    tokenizer: Any, first: Sequence[str], second: Sequence[str] | None, max_length: int, typed: bool = True
) -> tuple[list[Ids], list[Ids] | None]:
    """Ids and types of each text or pair, cut to max_length; types are None if the tokenizer has none, or the model reads none
    (typed)."""
    with LOCK, around(), panics(tokenizer):
        template = None if not _known(tokenizer) else _template(tokenizer.backend_tokenizer, second is not None)
        if template is None or template.count > max_length:
            ids, types = _called(tokenizer, first, second, max_length)
            return ids, types if typed else None
        backend = tokenizer.backend_tokenizer
        _plain(tokenizer)
        room, right = max_length - template.count, tokenizer.truncation_side == "right"
        kept: dict[str, tuple[Ids, int]] = {}
        for part in _slices(list(dict.fromkeys((*first, *(second or ())))), lambda text: len(text)):
            for text, encoding in zip(part, backend.encode_batch_fast(part, add_special_tokens=False), strict=True):
                ids = encoding.ids
                kept[text] = np.array(ids[:room] if right else ids[max(len(ids) - room, 0) :], np.int64), len(ids)
    made = []
    for i, text in enumerate(first):
        own = [kept[text]] if second is None else [kept[text], kept[second[i]]]
        counts = (min(own[0][1], room),) if second is None else cut(own[0][1], own[1][1], room)
        texts = [ids[:n] if right else ids[len(ids) - n :] for (ids, _), n in zip(own, counts, strict=True)]
        made.append(template.around(texts))
    typed = typed and "token_type_ids" in tokenizer.model_input_names
    return [ids for ids, _ in made], [types for _, types in made] if typed else None


def _called(
    tokenizer: Any, first: Sequence[str], second: Sequence[str] | None, max_length: int
) -> tuple[list[Ids], list[Ids] | None]:
    found: list[tuple[Any, Any]] = []
    pairs = list(zip(first, second or first, strict=True))
    for part in _slices(pairs, lambda pair: len(pair[0]) + len(pair[1])):
        queries, documents = [a for a, _ in part], None if second is None else [b for _, b in part]
        tokens = tokenizer(
            queries, documents, truncation=True, max_length=max_length, padding=False, return_attention_mask=False
        )
        types = tokens.get("token_type_ids")
        found += zip(tokens["input_ids"], types or [None] * len(part), strict=True)
    typed = bool(found) and found[0][1] is not None
    return (
        [np.asarray(ids, np.int64) for ids, _ in found],
        [np.asarray(types, np.int64) for _, types in found] if typed else None,
    )


def _slices(items: list[Any], size: Callable[[Any], int]) -> Iterator[list[Any]]:
    part: list[Any] = []
    total = 0
    for item in items:
        if part and (total + size(item) > SLICE or len(part) >= TEXTS):
            yield part
            part, total = [], 0
        part.append(item)
        total += size(item)
    if part:
        yield part


def _known(tokenizer: Any) -> bool:
    """Whether a call of this tokenizer is the call that the steps above describe."""
    from transformers import PreTrainedTokenizerFast

    cls: Any = type(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or getattr(tokenizer, "_in_target_context_manager", False):
        return False
    usual: Any = PreTrainedTokenizerFast
    same = all(getattr(cls, name, None) is getattr(usual, name, None) for name in _CALL) or (
        cls.__name__ in _ONLY_ASSERT and cls.__module__.startswith("transformers.models.")
    )
    return same and not any(name in vars(tokenizer) for name in _CALL)


def _plain(tokenizer: Any) -> None:
    """What a call of the tokenizer sets on its backend: nothing is cut or filled there."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    split = bool(getattr(tokenizer, "split_special_tokens", False))
    if backend.encode_special_tokens != split:
        backend.encode_special_tokens = split


def _template(backend: Any, pair: bool) -> Surround | None:
    """What the post-processor puts around texts; None if it is not what is described above."""
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    own = [ids for text in _PROBES if (ids := backend.encode(text, add_special_tokens=False).ids)]
    texts = [text for text in _PROBES if backend.encode(text, add_special_tokens=False).ids]
    if not own:
        return None
    found: Surround | None = None
    for i in range(len(texts)):
        probe = [i, -1 - i] if pair else [i]
        whole = backend.encode(*(texts[j] for j in probe), add_special_tokens=True)
        read = _read(whole, [own[j] for j in probe])
        if read is None or (found is not None and not _same(read, found)):
            return None
        found = read
    assert found is not None
    return found if found.count == backend.num_special_tokens_to_add(pair) else None


def _read(whole: Any, texts: list[list[int]]) -> Surround | None:
    ids, types, places = whole.ids, whole.type_ids, whole.sequence_ids
    special, kinds, at = [], [], 0
    for i, own in enumerate(texts):
        start = next((j for j in range(at, len(ids)) if places[j] == i), len(ids))
        end = start + len(own)
        if ids[start:end] != own or set(places[start:end]) != {i} or len(set(types[start:end])) != 1:
            return None
        special.append((np.array(ids[at:start], np.int64), np.array(types[at:start], np.int64)))
        kinds.append(types[start])
        if any(place is not None for place in places[at:start]):
            return None
        at = end
    if any(place is not None for place in places[at:]):
        return None
    special.append((np.array(ids[at:], np.int64), np.array(types[at:], np.int64)))
    return Surround(tuple(special), tuple(kinds))


def _same(a: Surround, b: Surround) -> bool:
    return a.types == b.types and all(
        np.array_equal(x, y) for one, other in zip(a.special, b.special, strict=True) for x, y in zip(one, other, strict=True)
    )


class panics:
    """A panic of the tokenizer's Rust is no Exception in Python, and passes what catches errors; here it becomes one."""

    def __init__(self, tokenizer: Any) -> None:
        self.name = getattr(tokenizer, "name_or_path", "")

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and type(error).__name__ == "PanicException":
            said = " ".join(str(error).split())
            whose = f" of {self.name}" if self.name else ""
            raise ValueError(f"Reranker: the tokenizer{whose} cannot read these texts: {said:.300}") from error


def in_vocabulary(ids: list[Ids], limit: int, what: str, config: str) -> None:
    """ValueError where a token has no row in the model's table of `limit`."""
    for i, own in enumerate(ids):
        if len(own) and (int(own.max()) >= limit or int(own.min()) < 0):
            wrong = int(own.max()) if int(own.max()) >= limit else int(own.min())
            came = f"{wrong} in text {i}"
            check.fail(
                "Reranker", what, f"below {limit}, config.json's {config}", came, "tokenizer and model are of two folders"
            )
