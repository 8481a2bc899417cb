"""Key-value caches of transformers: which are served, and the keys of each layer once new ones are stored.

A cache holds padded keys [B, H_kv, S, D]. A sequence's keys are its valid ones, cached and new, and its new queries are the
last of them. Where these stand side by side, attention reads them in the cache; else they are packed. A layer with a window
may have dropped the first keys. Then places without a key stand before the others, as many as leave each key's place mod 64 as
it was. The window hides them, and no sum changes its order.
"""

from __future__ import annotations

import functools
import uuid
from typing import Any

import torch
from torch import Tensor

from rerank_kernels import check
from rerank_kernels.models.bound import class_of, forward_of, name_of
from rerank_kernels.ops.opaque import traced
from rerank_kernels.ops.sequences import Sequences, Spans

CACHES = ("transformers.cache_utils.DynamicCache", "transformers.cache_utils.StaticCache")
GROWING, FIXED, ROLLING, ROLLING_FIXED = LAYERS = [
    f"transformers.cache_utils.{n}"
    for n in ("DynamicLayer", "StaticLayer", "DynamicSlidingWindowLayer", "StaticSlidingWindowLayer")
]
MOST_PLACES = 2**31 - 1
PROCESS = uuid.uuid4().hex  # a number of a forward means nothing in another one
CHUNK = 64  # keys: a multiple of what any sum over keys is cut in (NUMERICS.md, "attention")


class PrefixKeys:
    """Keys and values [T, H_kv, D] per layer of tokens that every sequence of a batch continues (prefix.py); it stores none."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers

    def get_seq_length(self) -> int:
        return int(self.layers[0][0].shape[0])


def mark(cache: Any, decoder: Any) -> None:
    """Notes on a cache whose keys it holds: keys of another model may have the same sizes."""
    if (forward := forward_of(decoder)) is not None:
        cache.rerank_kernels_of = PROCESS, forward.number


def chosen(op: str, given: list[Any], wanted: bool) -> Any:
    """The caller's cache, a new one if it is `wanted`, or None."""
    if len(given) > 1:
        raise ValueError(f"{op}: cache and past_key_values are one argument under two names; give one of them")
    if not given:
        if not wanted:
            return None
        from transformers import DynamicCache

        return DynamicCache()
    cache = given[0]
    if isinstance(cache, PrefixKeys):
        return cache
    if name_of(cache) not in CACHES:
        served = "a DynamicCache or StaticCache of transformers"
        check.fail(op, "past_key_values", served, class_of(cache), "leave it out, or make a DynamicCache()")
    for layer in getattr(cache, "layers", ()):
        if name_of(layer) not in LAYERS or getattr(layer, "record_past", False):
            check.fail(
                op, "past_key_values", "a cache of plain layers", f"layers of {class_of(layer)}", "make a DynamicCache()"
            )
    return cache


def belongs(op: str, cache: Any, decoder: Any) -> None:
    """An error where a cache is marked as another model's."""
    made, forward = getattr(cache, "rerank_kernels_of", None), forward_of(decoder)
    if made is not None and forward is not None and made[0] == PROCESS and made[1] != forward.number:
        check.fail(op, "past_key_values", "of this model as it is patched", "another one's prefix", "make a prefix of this one")


def passed(cache: Any) -> int:
    """The places that a cache has seen."""
    layer: Any = cache.layers[0] if cache.layers else None
    if name_of(layer) != FIXED or hasattr(layer, "cumulative_length") or layer.keys is None:
        return int(cache.get_seq_length())
    # transformers 4 counts the keys of the first row that are not 0, and ours are 0 at padding
    places = layer.keys.ne(0).any(-1).any(1).any(0).nonzero()
    return int(places[-1]) + 1 if len(places) else 0


def length(op: str, cache: Any, batch: int, new: int, windows: list[int | None], heads: int, d: int, dtype: torch.dtype) -> int:
    """The places that a cache has seen before `new` ones; an error where it is another model's or another batch's, or has no
    room. windows: of each layer."""
    layers = len(windows)
    if isinstance(cache, PrefixKeys):
        return cache.get_seq_length()
    held = () if cache is None else cache.layers[:layers]
    for i, layer in enumerate(held):
        if name_of(layer) == ROLLING and (windows[i] is None or layer.sliding_window < windows[i]):
            sees = f"all keys that layer {i} sees, {windows[i] or 'every one'}"
            check.fail(op, "past_key_values", sees, f"a window of {layer.sliding_window}", HINT)
    past = 0 if cache is None else passed(cache)
    for i, layer in enumerate(held):
        drops = name_of(layer) == ROLLING_FIXED and windows[i] is not None and windows[i] <= layer.max_cache_len
        if name_of(layer) in (FIXED, ROLLING_FIXED) and not drops and past + new > layer.max_cache_len:
            room = f"room for {past + new} places in layer {i}"
            check.fail(op, "past_key_values", room, layer.max_cache_len, "make one with a larger max_cache_len")
    for i, layer in enumerate(held if past == 0 else ()):  # emptied ones may stand there still
        keys = layer.keys
        if keys is not None and keys.dim() == 4 and (keys[:, :, 0:0].shape != (batch, heads, 0, d) or keys.dtype != dtype):
            room = f"keys [{batch}, {heads}, places, {d}] of {dtype} in layer {i}"
            check.fail(op, "past_key_values", room, f"{check.shape_of(keys)} of {keys.dtype}", HINT)
    for i in range(layers if past else 0):
        if i >= len(cache.layers) or cache.layers[i].keys is None:
            check.fail(op, "past_key_values", f"keys and values of {layers} layers", f"none of layer {i}", HINT)
        layer, keys, values = cache.layers[i], cache.layers[i].keys, cache.layers[i].values
        wanted = (batch, heads, keys.shape[2] if name_of(layer) != GROWING else past, d)
        if keys.shape != wanted or values.shape != wanted:
            came = f"{check.shape_of(keys)} and {check.shape_of(values)}"
            check.fail(op, "past_key_values", f"keys and values {list(wanted)} of layer {i}", came, HINT)
        if (other := next((t.dtype for t in (keys, values) if t.dtype != dtype), None)) is not None:
            check.fail(op, "past_key_values", f"{dtype} as the model", other, HINT)
        if name_of(layer) == ROLLING and keys.shape[2] != min(past, layer.sliding_window - 1):
            check.fail(op, "past_key_values", f"the last {layer.sliding_window - 1} keys of layer {i}", keys.shape[2], HINT)
    for i, layer in enumerate(held if batch else ()):  # a cut or a call that broke off may have reached some layers alone
        if layer.keys is not None and (seen := _seen(layer)) not in (None, past):
            check.fail(op, "past_key_values", f"{past} places in layer {i}, as in the first one", seen, HINT)
    return past


def _seen(layer: Any) -> int | None:
    """The places that a layer has seen; None where it does not count them, or a GPU would have to be waited for."""
    if name_of(layer) != FIXED:
        return int(layer.get_seq_length())
    count = getattr(layer, "cumulative_length", None)
    return None if count is None or (isinstance(count, Tensor) and count.device.type != "cpu") else int(count)


HINT = "a cache belongs to one model and one batch; make a new one"


def valid(op: str, mask: Any, cache: Any, b: int, past: int, t: int, device: torch.device) -> Tensor:
    """bool [B, past + T], True where a token is."""
    if isinstance(mask, dict):  # what generate() makes for a StaticCache
        if "full_attention" not in mask:
            check.fail(op, "attention_mask", "of full attention", f"masks of {', '.join(mask)}", "pass the mask [B, T]")
        mask = mask["full_attention"]
    if mask is None:
        return torch.ones(b, past + t, dtype=torch.bool, device=device)
    if isinstance(mask, Tensor) and mask.dim() == 4 and cache is not None and name_of(cache) == CACHES[1]:
        if all(name_of(layer) == ROLLING_FIXED for layer in cache.layers):  # its mask does not say what was dropped
            cure = "pass the mask [B, T]; to generate(), a DynamicCache()"
            check.fail(op, "attention_mask", "of full attention", "that of a StaticCache that drops keys", cure)
        if mask.shape[0] != b or mask.shape[2] != t or mask.shape[3] < past + t:
            check.fail(op, "attention_mask", f"[{b}, 1, {t}, at least {past + t}]", check.shape_of(mask))
        seen = mask[:, 0, :, : past + t]
        seen = seen if seen.dtype == torch.bool else seen == 0
        last = seen[:, -1]  # under a causal mask the last query sees every key that is one
        causal = torch.ones(t, past + t, dtype=torch.bool, device=mask.device).tril(past) & last[:, None]
        if not bool(((seen == causal) | ~last[:, past:, None]).all()):
            check.fail(op, "attention_mask", "causal", "a mask of its own for each query", "pass the mask [B, T]")
        return last
    if not isinstance(mask, Tensor) or mask.shape != (b, past + t):
        came = check.shape_of(mask) if isinstance(mask, Tensor) else type(mask).__name__
        behind = f", the {past} places of the cache first" if past else ""
        wanted = f"[B, T] = [{b}, {past + t}], nonzero where a token is{behind}"
        check.fail(op, "attention_mask", wanted, came, "a mask of its own for each query is not served")
    if mask.dtype != torch.bool and mask.numel() and mask.min() < 0:
        check.fail(op, "attention_mask", "nonzero where a token is", "negative values", "additive masks are not served")
    return mask != 0


class Keys:
    """The keys of a forward's new tokens: stored in the cache, and with what it held as packed tensors."""

    def __init__(self, op: str, cache: Any, there: Tensor, new: Sequences, past: int) -> None:
        self._prefix = cache if isinstance(cache, PrefixKeys) else None
        self.cache: Any = None if self._prefix else cache
        self.new, self.past = new, past
        self._op, self._there = op, there
        self._whole: Sequences | None = None
        self._spans: dict[int, Spans] = {}  # places from a sequence's first one to the next one's -> where its keys are
        self._rolled: dict[int, tuple[Sequences, int]] = {}  # places that are left -> the keys there, places of no key in front

    def stored(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Sequences | Spans | None]:
        """k and v [total, H_kv, D] of the new tokens -> those of all keys, and whose they are; None: the new tokens' own."""
        if self._prefix is not None:
            pairs = zip(self._prefix.layers[layer], (k, v), strict=True)
            k, v = (torch.cat([before, t]).index_select(0, self._continued) for before, t in pairs)
            return k, v, self.whole
        width = self._there.shape[1]
        places = {"cache_position": torch.arange(self.past, width, device=k.device)}  # transformers 4 stores where this says
        kept = self.cache.update(*(self.new.unpack(t).transpose(1, 2) for t in (k, v)), layer, places)
        if self.past == 0:
            return k, v, None
        if name_of(self.cache.layers[layer]) in (ROLLING, ROLLING_FIXED) and kept[0].shape[2] < width:
            keys, empty = self._rolling(kept[0].shape[2])
            kept = [torch.nn.functional.pad(t, (0, 0, empty, 0)) for t in kept]
        else:
            kept = [t[:, :, :width] for t in kept]
            if (there := self._in_place(*kept)) is not None:
                return there
            keys = self.whole
        k, v = (keys.pack(t.transpose(1, 2)) for t in kept)
        return k, v, keys

    def foresee(self, layers: int) -> None:
        """An error of a layer that drops keys, before any layer has stored one: the cache stays as it was."""
        t = self._there.shape[1] - self.past
        for layer in self.cache.layers[:layers] if self.cache is not None and self.past else ():
            if name_of(layer) in (ROLLING, ROLLING_FIXED):
                size = layer.sliding_window if name_of(layer) == ROLLING else layer.max_cache_len
                if size - 1 < self.past:
                    self._rolling(size - 1 + t)

    def _in_place(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Spans] | None:
        """Keys and values [B, H_kv, S, D] as [places, H_kv, D] without a copy, where a place is what k.stride(2) makes it; None
        where that cannot be."""
        (b, heads, s, d), (batch, head, place, feature) = k.shape, k.stride()
        if not b or self._runs is None or v.stride() != k.stride() or feature != 1 or place < 1 or batch % place:
            return None
        apart = batch // place  # from a sequence's first place to the next one's
        places = (b - 1) * apart + s
        if apart < 0 or places > MOST_PLACES:
            return None
        if apart not in self._spans:
            first, end = self._runs
            start = torch.arange(b, device=k.device) * apart
            self._spans[apart] = Spans(torch.stack([start + first, start + end]).int(), places)
        k, v = (t.as_strided((places, heads, d), (place, head, 1)) for t in (k, v))
        return k, v, self._spans[apart]

    @functools.cached_property
    def _runs(self) -> tuple[Tensor, Tensor] | None:
        """Where each sequence's valid places begin and end, if no padding stands between them."""
        if traced():
            return None
        count, place = self._there.sum(1), torch.arange(1, self._there.shape[1] + 1, device=self._there.device)
        end = (self._there * place).amax(1)
        first = end - count
        return None if bool((self._there & (place <= first[:, None])).any()) else (first, end)

    @property
    def whole(self) -> Sequences:
        """Of every key that the batch has had."""
        if self._whole is None:
            self._whole = self.new if self.past == 0 else Sequences.from_mask(self._there, op=self._op)
        return self._whole

    @functools.cached_property
    def _continued(self) -> Tensor:
        """[total of whole sequences], where each key stands in a list of the prefix's and then all new ones."""
        cu, first = self.whole.cu_seqlens.long(), self.new.cu_seqlens.long()[:-1]
        place = torch.arange(self.whole.total, device=cu.device)
        start, own = (torch.repeat_interleave(t, cu.diff(), output_size=self.whole.total) for t in (cu[:-1], first))
        place = place - start
        return torch.where(place < self.past, place, own + place)

    def _rolling(self, width: int) -> tuple[Sequences, int]:
        if width not in self._rolled:
            there = self._there[:, -width:]
            dropped = self._there[:, :-width].sum(1)
            first = there.shape[1] - self.new.padded[1]  # type: ignore[index]  # of the new tokens
            if bool(((dropped > 0) & ~there[:, :first].all(1)).any()):
                check.fail(self._op, "attention_mask", "without padding behind a sequence's first token", "padding there",
                           "a layer with a window has dropped keys that are still seen; pad on the left")  # fmt: skip
            places = torch.arange(CHUNK - 1, -1, -1, device=there.device) < (dropped % CHUNK)[:, None]
            self._rolled[width] = Sequences.from_mask(torch.cat([places, there], 1), op=self._op), CHUNK
        return self._rolled[width]
