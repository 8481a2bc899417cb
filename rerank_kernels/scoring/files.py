"""The files of a model folder: only what lies in it is read, and only what is a plain file.

A folder may come from anybody. So a setting in it may name no path outside, a link may not lead outside, and nothing is
opened that could wait for ever, as a named pipe does. Hugging Face's cache keeps its files as links from
models--ORG--NAME/snapshots/REVISION/ to models--ORG--NAME/blobs/: these links, and no others, may leave the folder.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

LARGEST = 1 << 24  # bytes of a file of settings; the largest that is known has a few million
READ = (".json", ".txt", ".model", ".spm", ".bpe", ".vocab", ".jinja", ".safetensors", ".bin")  # what the loaders may open
TEMPLATES = "additional_chat_templates"
KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


class Folder:
    """A model folder. Every path that this gives is a plain file or a folder inside it."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise ValueError(
                f"Reranker: model_or_path must be a local model folder, got {str(path)!r}, which is none; nothing is "
                "downloaded here: fetch a model with huggingface_hub.snapshot_download(...) and pass the folder it returns"
            )
        self.path, self.real = path, path.resolve()
        self.rooms = [self.real]
        for place in (self.real, *self.real.parents):
            if place.parent.name == "snapshots":
                self.rooms.append(place.parent.parent / "blobs")
                break

    def has(self, name: str) -> bool:
        return os.path.lexists(self.path / name)

    def file(self, name: str) -> Path:
        """A plain file in the folder; ValueError says what else it is."""
        place = self._inside(name)
        try:
            mode = place.stat().st_mode
        except OSError as error:
            self.refuse(name, f"{error.strerror or error}")
        if not stat.S_ISREG(mode):
            what = "a folder" if stat.S_ISDIR(mode) else KINDS.get(stat.S_IFMT(mode), "no file")
            self.refuse(name, f"it is {what}")
        return place

    def folder(self, name: str, setting: str) -> Folder:
        """The folder that a setting names: itself for "", else one inside."""
        if not isinstance(name, str) or any(
            path.is_absolute() or path.drive or ".." in path.parts for path in (PurePosixPath(name), PureWindowsPath(name))
        ):
            raise ValueError(f"Reranker: {setting} must be a path inside the folder, got {name!r:.80}")
        if "\0" in name or not self._inside(name).is_dir():
            raise ValueError(f"Reranker: {setting} must name a folder that is there, got {name!r:.80}")
        found = Folder(self.path / name) if name.strip("./") else self
        found.rooms = self.rooms
        return found

    def json(self, name: str) -> Any:
        """What a file of settings holds: an object, or for modules.json a list."""
        place = self.file(name)
        size = place.stat().st_size
        if size > LARGEST:
            self.refuse(name, f"it has {size:,} bytes, and settings have at most {LARGEST:,}")
        try:
            found = json.loads(place.read_bytes().decode("utf-8"))
        except RecursionError:
            self.refuse(name, "it is nested too deeply")
        except UnicodeDecodeError as error:
            self.refuse(name, f"it is not UTF-8: {error.reason} at byte {error.start}")
        except (OSError, ValueError) as error:
            self.refuse(name, f"{getattr(error, 'strerror', None) or error}")
        wanted: type = list if name == "modules.json" else dict
        if not isinstance(found, wanted):
            self.refuse(name, f"it must hold {'a list' if wanted is list else 'an object'}, got {_shown(found)}")
        return found

    def check(self) -> None:
        """Everything that a loader of transformers may open here."""
        for entry in os.scandir(self.path):
            if entry.name.endswith(READ):
                self.file(entry.name)
            elif entry.name == TEMPLATES:
                for inner in os.scandir(self._inside(entry.name)) if entry.is_dir() else ():
                    self.file(f"{TEMPLATES}/{inner.name}")

    def refuse(self, name: str, why: str) -> NoReturn:
        raise ValueError(f"Reranker: {self.path} must be a model folder with a readable {name}; {why}")

    def _inside(self, name: str) -> Path:
        place = self.path / name
        try:
            real = place.resolve()
        except (OSError, RuntimeError) as error:  # links in a circle
            self.refuse(name, f"{error}")
        if not any(real == room or room in real.parents for room in self.rooms):
            self.refuse(name, f"it is a link out of the folder, to {str(real)!r}; make a copy that holds the file: cp -rL")
        return place


def _shown(value: Any) -> str:
    if isinstance(value, list | dict):
        return ("[]" if isinstance(value, list) else "{}") if not value else f"a {type(value).__name__} of {len(value):,}"
    return f"{value!r:.60}"
