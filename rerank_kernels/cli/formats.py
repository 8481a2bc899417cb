"""Which formats there are, and which one a file has: by its name, or by what --format says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from rerank_kernels.cli.errors import InputError

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
TABLES = ("csv", "tsv", "parquet")
NAMES = ("jsonl", "json", "csv", "tsv", "parquet", "jsonl.gz", "json.gz", "csv.gz", "tsv.gz")
# known by name, and not read: better said than taken for lines of text
FOREIGN = (
    *(".arrow", ".avro", ".bz2", ".db", ".doc", ".docx", ".feather", ".h5", ".html", ".npz", ".ods", ".orc", ".pdf", ".pickle"),
    *(".pkl", ".sqlite", ".tar", ".tgz", ".xls", ".xlsx", ".xml", ".xz", ".yaml", ".yml", ".zip", ".zst"),
)


@dataclass(frozen=True)
class Format:
    """kind: jsonl (one object per line), json (one array), csv, tsv, parquet, text (one document per line). gz: compressed."""

    kind: str
    gz: bool = False

    def __str__(self) -> str:
        return self.kind + ".gz" * self.gz


def of(path: str, said: str | None, option: str, other: str | None = "jsonl") -> Format:
    """The format of `path`: as `said` (by `option`), by its suffix, else jsonl for stdin, stdout and names without a suffix.

    other: what a name with another suffix is taken for (rank's text); None: an error.
    """
    if said is not None:
        return Format(said.removesuffix(".gz"), said.endswith(".gz"))
    name = PurePath(path.lower())
    gz = name.suffix == ".gz"
    suffix = name.with_suffix("").suffix if gz else name.suffix
    if path == "-" or suffix in SUFFIXES or not suffix:
        kind = SUFFIXES.get(suffix, other or "jsonl")
        if kind == "parquet" and gz:
            raise InputError(f"{path}: Parquet is compressed inside, and is not read or written as .gz")
        return Format(kind, gz)
    if other is None or suffix in FOREIGN:
        raise InputError(
            f"{path}: the format {suffix} is not known; there are {', '.join(NAMES)}, by the name's ending or by {option}"
        )
    return Format(other, gz)
