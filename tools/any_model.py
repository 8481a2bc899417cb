"""Which models of the installed transformers rk.invariant serves: each that can be built small, batch 1 against 2, 3, 7.

    python tools/any_model.py [--only bert gpt2] [--json FILE]
    python tools/any_model.py --write [FILE]  # what a run found into docs/INVARIANT.md, beside the table of ops

Each model gets random weights and texts of random ids, padded on the right; a model of images gets one per text. "pass": the
states of every text have the bits that it gets alone. "same padding": they have those that it gets alone with the same padding,
and others without padding: it counts in the model's formula, or moves a sum that no mask of PyTorch's attention hides. "by
formula": the other texts are in the model's own formula, as stock shows. "refused": an op was refused by name. "fail": bits
differ. Others could not be built or called.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import logging
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

import rerank_kernels as rk
from rerank_kernels.scoped import elementwise, exact, table

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))
from tools import pages  # noqa: E402

PAGE = ROOT / "docs" / "INVARIANT.md"
KINDS = ("pass", "same padding", "by formula", "refused", "fail", "error", "not called", "not built")
LENGTHS = (5, 12, 9, 1, 7, 12, 3)
SECONDS = 20  # for one model
MOST = 20_000_000  # parameters of what counts as a toy
SMALL = {
    ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "embedding_size", "word_embed_proj_dim"): 64,
    ("num_hidden_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_layers"): 2,
    ("num_attention_heads", "n_head", "n_heads", "encoder_attention_heads", "decoder_attention_heads", "num_heads"): 4,
    ("num_key_value_heads",): 2,
    ("head_dim", "d_kv"): 16,
    (
        "intermediate_size",
        "n_inner",
        "ffn_dim",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "d_ff",
        "hidden_dim",
        "moe_intermediate_size",
    ): 96,
    ("vocab_size", "n_vocab"): 120,
    ("num_experts", "num_local_experts", "n_routed_experts"): 4,
    ("num_experts_per_tok",): 2,
    ("image_size",): 64,
}


def small(model_type: str) -> Any:
    config = AutoConfig.for_model(model_type)
    for names, value in SMALL.items():
        for name in names:
            if isinstance(getattr(config, name, None), int):
                with contextlib.suppress(NotImplementedError):  # some say how deep they are in a way of their own
                    setattr(config, name, value)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        if isinstance(getattr(config, name, None), int) and getattr(config, name) >= 120:
            setattr(config, name, 1)
    if isinstance(layers := getattr(config, "layer_types", None), list):
        with contextlib.suppress(AttributeError):  # made of the number of layers
            config.layer_types = layers[:2]
    return config


def built(model_type: str) -> Any:
    config = small(model_type)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModel.from_config(config).parameters())
    if size > MOST:
        raise ValueError(f"{size} parameters at toy size")
    torch.manual_seed(0)
    return AutoModel.from_config(config).eval()


def states(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    if model.main_input_name == "pixel_values":  # an image of each text's ids
        size = model.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        image = torch.nn.functional.interpolate(ids[:, None, None].float() / 100, size=(height, width))
        out = model(pixel_values=image.expand(-1, 3, -1, -1).contiguous())
    else:
        decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        out = model(input_ids=ids, attention_mask=mask, **decoder)
    return out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0]


def judged(model: Any) -> tuple[str, str]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 100, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.where(mask.bool(), ids, getattr(model.config.get_text_config(), "pad_token_id", None) or 0)
    lengths = LENGTHS if model.main_input_name == "input_ids" else (max(LENGTHS),) * len(LENGTHS)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            stock = [states(model, ids[:1, :n], mask[:1, :n])[0] for n in (lengths[0], max(LENGTHS))]
        except Exception as error:
            return "not called", f"{type(error).__name__}: {error}"
        try:
            with rk.invariant():
                padded = [states(model, ids[i : i + 1], mask[i : i + 1])[0] for i in range(len(lengths))]
                alone = [states(model, ids[i : i + 1, :n], mask[i : i + 1, :n])[0] for i, n in enumerate(lengths)]
                together = {b: states(model, ids[:b], mask[:b]) for b in (1, 2, 3, 7)}
        except rk.InvariantError as error:
            return "refused", str(error).partition(";")[0].removeprefix("rk.invariant: ")
    far = _apart(alone[0], stock[0])
    if not far < 1e-3:
        return "fail", f"{far:.1e} away from stock"
    for batch, found in together.items():
        for i, y in enumerate(found):
            seen = len(alone[i]) if lengths is LENGTHS else len(y)  # what stands in padded places is nobody's
            if not torch.equal(y[:seen], padded[i][:seen]):
                with torch.no_grad():
                    apart = _apart(
                        states(model, ids[:batch], mask[:batch])[i][:seen],
                        states(model, ids[i : i + 1], mask[i : i + 1])[0][:seen],
                    )
                if apart > 1e-2:
                    return "by formula", f"{apart:.1e} in stock"
                return "fail", f"batch {batch}, text {i}: {_apart(y[:seen], padded[i][:seen]):.1e}"
    apart = [_apart(p[: len(a)], a) for p, a in zip(padded, alone, strict=True)]
    if any(apart):
        return "same padding", f"padding makes {max(apart):.1e}, and in stock {_apart(stock[1][: len(stock[0])], stock[0]):.1e}"
    return "pass", ""


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))  # some toys fade to subnormals


def _too_long(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def ops_written() -> str:
    """The table of PyTorch's ops in docs/INVARIANT.md."""
    routed = {key.partition(".")[0] for key in table.ROUTES}
    kinds = {
        "computed by us": routed,
        "PyTorch's, in pieces, so that each element goes through its vector code": elementwise.IN_PIECES - routed,
        "exact: nothing is computed": exact.MOVED,
        "exact: one correctly rounded step per element": exact.ONE_STEP,
        "exact: a choice among the values of a row, or a count": exact.CHOSEN,
        "exact for whole numbers": exact.EXACT_OF_INTEGERS - exact.EXACT,
    }
    lines = ["| kind | PyTorch's ops |", "| --- | --- |"]
    for kind, names in kinds.items():
        lines.append(f"| {kind} | {', '.join(f'`{n}`' for n in sorted(names, key=lambda n: n.lstrip('_')))} |")
    return "\n".join(lines) + "\n"


def models_written(found: dict[str, tuple[str, str]]) -> str:
    """The table of models in docs/INVARIANT.md. Those that could not be built or called are counted alone."""
    of = {kind: sorted(m for m, (k, _) in found.items() if k == kind) for kind in KINDS}
    lines = ["| verdict | model types of transformers | which |", "| --- | ---: | --- |"]
    for kind in (*KINDS[:3], "fail"):
        lines.append(f"| {kind} | {len(of[kind])} | {', '.join(of[kind])} |")
    refused = "; ".join(f"{m}: {found[m][1].partition(' in ')[0].removeprefix('aten::')}" for m in of["refused"])
    lines.append(f"| refused, by the op | {len(of['refused'])} | {refused} |")
    lines.append(f"| not built small, or wanting other inputs | {sum(len(of[k]) for k in KINDS[5:])} | |")
    return "\n".join(lines) + f"\n\n(transformers {transformers.__version__}, torch {torch.__version__}, float32, a CPU)\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=sorted(MODEL_MAPPING_NAMES))
    parser.add_argument("--json")
    parser.add_argument(
        "--write", nargs="?", const="", help="no run: fill docs/INVARIANT.md, with models of this file of --json"
    )
    options = parser.parse_args()
    if options.write is not None:
        models = models_written(json.loads(Path(options.write).read_text())) if options.write else None
        print(pages.write(PAGE, "any_model", {"ops": ops_written(), "models": models}))
        return
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGALRM, _too_long)
    torch.set_num_threads(1)
    found = {}
    for model_type in options.only:
        signal.alarm(SECONDS)
        kind = "not built"
        try:
            model = built(model_type)
            kind = "error"
            found[model_type] = judged(model)
        except Exception as error:
            found[model_type] = kind, f"{type(error).__name__}: {error}".partition("\n")[0]
        finally:
            signal.alarm(0)
        print(f"{model_type:30} {found[model_type][0]:10} {found[model_type][1][:150]}", flush=True)
    print(dict(collections.Counter(kind for kind, _ in found.values())))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)
    sys.exit(any(kind == "fail" for kind, _ in found.values()))


if __name__ == "__main__":
    main()
