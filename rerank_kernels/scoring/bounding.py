"""What of a very long text is given to the tokenizer, which reads all of it and throws away what is beyond max_length.

A word of 50 MB takes it minutes and gigabytes. So a text of more than LONG characters is cut first, by rules that know only the
pair, the tokenizer and max_length: a score stays a function of its pair. A shorter text is not touched.

Exact, the ids are those of the whole texts:
- A cut before a space, tab or new line that follows a word, if enough words stand before it. BERT's, byte-level and
  sentencepiece's tokenizers split there before they look at their vocabulary, and no normaliser changes a letter because of
  one beyond a space. So the ids of what is before are a prefix of all ids. A word with an ASCII letter or digit is one id or
  more. Enough: max_length, and more words than the other text of the pair can have ids, since longest_first asks which of the
  two is longer. BERT sets each CJK ideograph apart, so that a cut after one is as good, and each counts as a word.
- WordPiece gives one [UNK] to a word of more than max_input_chars_per_word characters. ASCII letters and digits are one
  character each and are never split. So of a run of them that is longer than twice that limit, twice that limit is enough.

Bounded, for what is left: of a word of more than WORD characters its first WORD, of a text of more than TEXT its first TEXT.
The ids may be others only if they would come from beyond that, or where a merge of BPE or a path of Unigram looks that far
ahead. No text that was written for a reader has such a word. A BoundedWarning says so.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

LONG = 1 << 16
WORD = 1 << 17
TEXT = 1 << 22
MOST_IDS = 20  # of one character, after normalising: U+FDFA is 18 letters in NFKC, a character is at most 4 bytes

_WORDS = re.compile(r"[0-9A-Za-z][^ \t\n]*")
_WORDS_AND_IDEOGRAPHS = re.compile(r"[0-9A-Za-z][^ \t\n\u4e00-\u9fff]*|[\u4e00-\u9fff]")
_WORD = re.compile(r"[^ \t\n]+")


class BoundedWarning(UserWarning):
    """`text` is so long that not all of it was given to the tokenizer."""

    def __init__(self, message: str, text: str = "") -> None:
        super().__init__(message)
        self.text = text


@dataclass(frozen=True)
class Rules:
    """What is known of a tokenizer. words: finds what is one id at least and has a cut behind it, None if nothing is known;
    run: a run of ASCII letters that is longer, and what of it is enough."""

    words: re.Pattern[str] | None = None
    run: re.Pattern[str] | None = None

    @classmethod
    def of(cls, tokenizer: Any) -> Rules:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or getattr(tokenizer, "truncation_side", "right") != "right":
            return cls()
        found = json.loads(backend.to_str())
        added = [token["content"] for token in found.get("added_tokens") or ()]
        if any(re.search(r"\s", content) or not content.isascii() for content in added):  # could stand on both sides of a cut
            return cls()
        model, normaliser = found["model"]["type"], (found.get("normalizer") or {})
        before = found.get("pre_tokenizer") or {}
        steps = [step["type"] for step in before.get("pretokenizers", [before]) if step]
        if model == "WordPiece" and steps == ["BertPreTokenizer"] and normaliser.get("type") == "BertNormalizer":
            if not normaliser.get("clean_text"):
                return cls()
            words = _WORDS_AND_IDEOGRAPHS if normaliser.get("handle_chinese_chars") else _WORDS
            if any(content.isalnum() for content in added):  # could stand inside a run
                return cls(words)
            keep = 2 * int(found["model"]["max_input_chars_per_word"])
            return cls(words, re.compile(rf"([0-9A-Za-z]{{{keep}}})[0-9A-Za-z]+"))
        splits = "WhitespaceSplit" in steps or (steps == ["ByteLevel"] and before.get("use_regex", True))
        plain = all(
            step["type"] in ("Precompiled", "NFC", "NFKC", "Lowercase")
            or (step["type"] == "Replace" and step["pattern"] == {"Regex": " {2,}"} and step["content"] in (" ", "▁"))
            for step in normaliser.get("normalizers", [normaliser])
            if step
        )
        return cls(_WORDS if splits and plain and model in ("BPE", "Unigram") else None)


def bounded(rules: Rules, text: str, other: str, max_length: int) -> tuple[str, bool]:
    """What of `text`, in a pair with `other`, is read, and whether the ids are those of the whole."""
    if len(text) <= LONG:
        return text, True
    if rules.words is not None and len(other) <= LONG:
        needed = max_length + MOST_IDS * len(other)
        for count, word in enumerate(rules.words.finditer(text), 1):
            if count == needed:
                text = text[: word.end()]
                break
    if rules.run is not None:
        text = rules.run.sub(r"\1", text)
    if len(text) <= WORD:
        return text, True
    short = _WORD.sub(lambda word: word[0][:WORD], text)[:TEXT]
    return short, short == text
