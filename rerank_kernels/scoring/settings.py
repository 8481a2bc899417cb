"""What sentence-transformers' files in a folder say: every key of every file that it reads is served, or refused by name.

    modules.json                         which modules, in which folders, in this order
    sentence_bert_config.json            of the transformer: its longest text, lower case, options of its loaders
    1_Pooling/config.json                how tokens become one vector
    1_LogitScore/config.json             which tokens of a decoder answer
    config_sentence_transformers.json    prompts, similarity, the activation of a cross-encoder
    config.json: sentence_transformers   the activation of a cross-encoder, of older versions

A setting means what it means in version 6. A folder without modules.json gets what sentence-transformers gives it: the mean, of
a decoder the last token; there it has any length, here length 1, since similarity is a cosine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

from rerank_kernels import check
from rerank_kernels.ops.pooling import POOL_MODES
from rerank_kernels.scoring.files import Folder

KINDS = ("cross-encoder", "embedding")
SIMILARITIES = ("cosine", "dot")
ACTIVATIONS = {"Sigmoid": "sigmoid", "Identity": "identity"}
MODEL_TYPES = {"CrossEncoder": KINDS[0], "SentenceTransformer": KINDS[1]}
PROMPTS = {"query": "", "document": ""}  # what encode_query() and encode_document() put before a text where nothing is said

ROOT = "config_sentence_transformers.json"
BERT = [
    f"sentence_{name}_config.json" for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
LOADERS = ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs")
TASKS = {"sequence-classification": KINDS[0], "feature-extraction": KINDS[1]}
OUTPUTS = {KINDS[0]: "scores", KINDS[1]: "token_embeddings"}
ANSWERS = ["Transformer", "LogitScore"]
# of the transformer before LogitScore; None: it says how the chat template makes a prompt, in whose place a template of ours is
OF_ANSWERS = {
    "transformer_task": "text-generation",
    "module_output_name": "causal_logits",
    "modality_config": None,
    "processing_kwargs": None,
}
LEGACY = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


@dataclass
class Settings:
    """transformer: the folder of config.json, weights and tokenizer. limit: the most tokens of a text, None if unsaid."""

    kind: str
    transformer: Any  # a Folder; None of a model that was loaded
    limit: int | None = None
    limit_said: str = ""
    lower: bool = False
    pooling: str = "mean"
    normalise: bool = True
    similarity: str = "cosine"
    activation: str = "sigmoid"
    prompts: dict[str, str] = field(default_factory=lambda: dict(PROMPTS))
    default: str = ""  # the prompt that encode() puts before a text
    answers: tuple[int, int | None] | None = None  # tokens of a decoder that answers; then its chat template makes its prompts


def read(folder: Folder, kind: str | None = None) -> Settings:
    """The settings of a folder. kind: what the user says that it is."""
    root = folder.json(ROOT) if folder.has(ROOT) else {}
    modules = _modules(folder) if folder.has("modules.json") else []
    transformer = modules[0][1] if modules else folder
    config = transformer.json("config.json")
    said = root.get("model_type") if modules else None
    if said is not None and said not in tuple(MODEL_TYPES):
        check.fail("Reranker", f"{ROOT}'s model_type", " or ".join(MODEL_TYPES), f"{said!r:.60}")
    pools = [name for name, _, _ in modules[1:]] not in ([], ANSWERS[1:])
    stored = MODEL_TYPES[said] if said else KINDS[1] if pools else kind_of(config.get("architectures"))
    found = Settings(kind or stored, transformer)
    if kind not in (None, stored):  # as in sentence-transformers, what is loaded as another kind keeps no settings of the first
        modules, root = [], {}
    kind = found.kind
    if writes(config.get("architectures")) and config.get("is_causal", True):
        found.pooling = "lasttoken"  # sentence-transformers' choice too, where no modules.json says another
    if modules:
        if [name for name, _, _ in modules] == ANSWERS:
            found.answers = _answers(modules.pop()[1])
        _of_transformer(found, transformer)
        _of_modules(found, modules[1:])
        _of_root(found, root)
    if kind == KINDS[0]:
        _of_classifier(found, root if modules else {}, config)
    return found


def kind_of(architectures: Any) -> str:
    """A list of class names, as config.json holds it."""
    names = architectures if isinstance(architectures, list) else []
    classifies = any(str(name).endswith("ForSequenceClassification") for name in names)
    return KINDS[0] if classifies or writes(names) else KINDS[1]


def writes(architectures: Any) -> bool:
    """Whether the first class has a language head, and so answers yes or no (templates.py)."""
    return isinstance(architectures, list) and str(next(iter(architectures), "")).endswith("ForCausalLM")


def _modules(folder: Folder) -> list[tuple[str, Folder, dict[str, Any]]]:
    """(class, folder, entry) of each module, the transformer first."""
    found: list[tuple[str, Folder, dict[str, Any]]] = []
    entries = folder.json("modules.json")
    names = set()
    for place, entry in enumerate(entries):
        what = f"modules.json: module {place}"
        if not isinstance(entry, dict) or not isinstance(kind := entry.get("type"), str):
            raise ValueError(f"Reranker: {what} must be an object with a type, got {entry!r:.80}")
        package, _, name = kind.rpartition(".")
        if package.partition(".")[0] != "sentence_transformers":
            check.fail("Reranker", f"{what}'s type", "a class of sentence_transformers", f"{kind!r:.80}")
        if entry.get("kwargs"):
            check.fail("Reranker", f"{what}'s kwargs", "unset, for encode() takes none here", f"{entry['kwargs']!r:.60}")
        own = entry.get("name", str(place))
        if not isinstance(own, str) or own in names:
            check.fail("Reranker", f"{what}'s name", "a name of its own, for a later module replaces the first", f"{own!r:.60}")
        names.add(own)
        # Normalize has nothing to store, and its folder, which would be empty, gets lost in git
        missing = name == "Normalize" and isinstance(path := entry.get("path"), str) and not folder.has(path)
        found.append(
            (name, folder.folder("" if missing else entry.get("path", ""), f"{what}'s path"), {} if missing else entry)
        )
    given = [name for name, _, _ in found]
    if given not in (["Transformer"], ["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"], ANSWERS):
        came = ", ".join(given) or "none"
        check.fail("Reranker", "modules.json", "Transformer, Pooling and perhaps Normalize", f"{came:.120}")
    return found


def _of_transformer(found: Settings, folder: Folder) -> None:
    nothing: tuple[str, dict[str, Any]] = BERT[0], {}
    name, config = next(((n, c) for n in BERT if folder.has(n) and (c := folder.json(n))), nothing)

    def refuse(key: str, wanted: str, hint: str = "") -> NoReturn:
        check.fail("Reranker", f"{name}'s {key}", wanted, f"{config[key]!r:.60}", hint)

    for key, value in config.items():
        if key in LOADERS:
            left = value if not isinstance(value, dict) else {k: v for k, v in value.items() if k != "trust_remote_code"}
            if left:  # sentence-transformers drops trust_remote_code too
                refuse(key, "empty, for a folder does not choose how it is loaded")
        elif key == "max_seq_length":
            found.limit, found.limit_said = value, f"{name}'s max_seq_length"
        elif key == "do_lower_case":
            if not isinstance(value, bool):
                refuse(key, "true or false")
            found.lower = value
        elif found.answers is not None and key in OF_ANSWERS:
            if (wanted := OF_ANSWERS[key]) not in (None, value):
                refuse(key, str(wanted))
        elif key == "transformer_task":
            if TASKS.get(value if isinstance(value, str) else "") != found.kind:
                refuse(key, next(task for task, kind in TASKS.items() if kind == found.kind))
        elif key == "module_output_name":
            if value != OUTPUTS[found.kind]:
                refuse(key, OUTPUTS[found.kind])
        elif key == "modality_config":
            if not isinstance(value, dict) or not _plain_text(value, found.kind):
                refuse(key, "of text alone")
        elif key == "unpad_inputs":
            pass  # how a batch is laid out: no text's tokens depend on it
        elif key not in ("query_length", "document_length", "query_expansion", "tokenizer_name_or_path", "processing_kwargs"):
            check.fail("Reranker", name, "of keys that are known", f"{key!r:.60}")
        elif value not in (None, {}):
            refuse(key, "unset")


def _plain_text(modalities: dict[str, Any], kind: str) -> bool:
    logits = {"method": "forward", "method_output_name": "logits"}
    states = {"method": "forward", "method_output_name": "last_hidden_state"}
    return modalities == {"text": logits if kind == KINDS[0] else states}


def _of_modules(found: Settings, modules: list[tuple[str, Folder, dict[str, Any]]]) -> None:
    found.normalise = "Normalize" in [name for name, _, _ in modules]
    if not modules and found.kind == KINDS[1]:
        check.fail("Reranker", "modules.json", "Transformer, Pooling and perhaps Normalize", "Transformer alone")
    for name, folder, entry in modules:
        if name == "Pooling":
            found.pooling = _pooling(folder)
        elif entry and folder.has("config.json"):
            config = folder.json("config.json")
            for key in ("module_input_name", "module_output_name"):
                if (value := config.get(key)) not in (None, "sentence_embedding"):
                    check.fail("Reranker", f"{folder.path.name}'s {key}", "sentence_embedding", f"{value!r:.60}")


def _answers(folder: Folder) -> tuple[int, int | None]:
    config, name = folder.json("config.json"), f"{folder.path.name}'s"
    yes, no = config.pop("true_token_id", None), config.pop("false_token_id", None)
    for key, value in (("true_token_id", yes), ("false_token_id", 0 if no is None else no)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            check.fail("Reranker", f"{name} {key}", "a token id", f"{value!r:.60}")
    if (value := config.pop("module_input_name", "causal_logits")) != "causal_logits":
        check.fail("Reranker", f"{name} module_input_name", "causal_logits", f"{value!r:.60}")
    if config:
        check.fail("Reranker", f"{name} config.json", "of keys that are known", f"{next(iter(config))!r:.60}")
    return yes, no


def _pooling(folder: Folder) -> str:
    config, name = folder.json("config.json"), folder.path.name
    modes = config.pop("pooling_mode", None)
    legacy = {key: config.pop(full) for key in LEGACY if (full := f"pooling_mode_{key}") in config}
    if modes is None:
        on = [key.removesuffix("_tokens").removesuffix("_token") for key, value in legacy.items() if value]
        modes = on or ("mean" if not legacy else "none")
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or len(modes) != 1 or modes[0] not in POOL_MODES:
        came = " + ".join(map(str, modes)) if isinstance(modes, list) else repr(modes)
        check.fail("Reranker", f"{name}'s pooling mode", " or ".join(POOL_MODES), f"{came:.60}")
    if config.pop("include_prompt", True) is not True:
        check.fail("Reranker", f"{name}'s include_prompt", "true, for tokens of a prompt are pooled as the others", "false")
    config.pop("word_embedding_dimension", None), config.pop("embedding_dimension", None)
    if config:
        check.fail("Reranker", f"{name}'s config.json", "of keys that are known", f"{next(iter(config))!r:.60}")
    return str(modes[0])


def _of_root(found: Settings, root: dict[str, Any]) -> None:
    similarity = root.get("similarity_fn_name")
    if found.kind == KINDS[1] and similarity is not None:
        if similarity not in SIMILARITIES:
            check.fail("Reranker", f"{ROOT}'s similarity_fn_name", " or ".join(SIMILARITIES), f"{similarity!r:.60}")
        found.similarity = similarity
    prompts = root.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        check.fail("Reranker", f"{ROOT}'s prompts", "an object of texts", f"{prompts!r:.60}")
    found.prompts |= {name: text for name, text in prompts.items() if text is not None}
    name = root.get("default_prompt_name")
    if name is not None:
        if not isinstance(name, str) or name not in found.prompts:
            wanted = f"one of its prompts, {', '.join(found.prompts):.120}"
            check.fail("Reranker", f"{ROOT}'s default_prompt_name", wanted, f"{name!r:.60}")
        found.default = found.prompts[name]
    if root.get("requirements"):
        _requirements(root["requirements"])


def _requirements(wanted: Any) -> None:
    """Versions that the author asks for, of packages that compute here; others are not used."""
    import importlib.metadata

    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    for package, said in wanted.items() if isinstance(wanted, dict) else ():
        package = "torch" if package == "pytorch" else package
        said = said.get("specifier", "") if isinstance(said, dict) else said
        if package in ("torch", "transformers", "tokenizers") and isinstance(said, str):
            version = importlib.metadata.version(package)
            try:
                fits = SpecifierSet(said).contains(version, prereleases=True)
            except InvalidSpecifier:  # sentence-transformers goes on as well
                continue
            if not fits:
                check.fail("Reranker", f"{package}, which {ROOT} requires,", f"{said!r:.60}", version)


def _of_classifier(found: Settings, root: dict[str, Any], config: dict[str, Any]) -> None:
    """A cross-encoder's activation decides which of our numbers predict() gives: score for sigmoid, logit for identity."""
    if found.default and found.answers is None:
        check.fail("Reranker", f"{ROOT}'s default_prompt_name", "unset for a cross-encoder", f"{found.default!r:.60}")
    if root.get("keep_in_fp32_modules"):
        came = f"{root['keep_in_fp32_modules']!r:.60}"
        check.fail("Reranker", f"{ROOT}'s keep_in_fp32_modules", "unset, for the head is float32 anyway", came)
    own = config.get("sentence_transformers")
    own = own if isinstance(own, dict) else {}
    if own.get("max_length") is not None:
        found.limit, found.limit_said = own["max_length"], "config.json's sentence_transformers.max_length"
    places = [
        (f"{ROOT}'s activation_fn", root.get("activation_fn")),
        ("config.json's sentence_transformers.activation_fn", own.get("activation_fn")),
        ("config.json's sbert_ce_default_activation_function", config.get("sbert_ce_default_activation_function")),
    ]
    where, path = next(((where, path) for where, path in places if path is not None), ("", "torch.nn.Sigmoid"))
    name = path.rpartition(".")[2] if isinstance(path, str) and path.startswith("torch.nn.") else ""
    if name not in ACTIVATIONS:
        wanted = " or ".join(f"torch.nn.{one}" for one in ACTIVATIONS)
        check.fail("Reranker", where, wanted, f"{path!r:.80}", "other activations: sentence-transformers and rk.patch")
    found.activation = ACTIVATIONS[name]
