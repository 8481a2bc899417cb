"""The ops, and the family of each: a file of that name in ops/, in csrc/'s rooms and in a backend's folder.

Public names, registry, promises and tests go over this table, in this order. It imports nothing: `--help` waits for no torch.
"""

from __future__ import annotations

OPS = {
    "layer_norm": "norm",
    "rms_norm": "norm",
    "normalize": "norm",
    "softmax": "softmax",
    "sum": "softmax",
    "mean": "softmax",
    "linear": "linear",
    "bmm": "linear",
    "activation": "linear",
    "rotary": "rotary",
    "attention": "attention",
    "pool": "pooling",
    "sigmoid": "pooling",
    "score_head": "pooling",
    "sparse_ffn": "sparse_ffn",
}
