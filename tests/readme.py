"""The README followed to the letter: `make readme`, or python3 tests/readme.py [--write] [--torch REQUIREMENT]

Runs the bash and python blocks of PAGES, README.md first, as printed and in their order, in an empty folder: bash blocks in
one shell's environment, each python block as a program of its own. What a block prints is held against its page, digit for
digit, where `<!-- readme:NAME -->` and `<!-- /readme -->` enclose it (NAMES below); --write puts it there, and draws PICTURE,
of the page that `verify` wrote. A block that is not run has `<!-- readme: not run, REASON -->` above it, and is named at the
end. Any other block is an error.

Two things are not as printed. ADDRESS, which the reader replaces too, is a repository of the files that lie here, committed
or not. With --torch, the line that installs PyTorch is `pip install REQUIREMENT`, where the printed index cannot be had.
Before the blocks that name FOLDER, a small model with random weights is put there: the reader has one of his own.
Needs nothing but Python's library, git and what the README itself asks for.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))
import browser  # noqa: E402
from tools import pages  # noqa: E402
from tools.pages import Wrong  # noqa: E402  also of a page that says to do what fails

PAGES = ("README.md", "docs/USE.md")  # the second goes on where the first ends
PICTURE = ROOT / "docs" / "verify.png"
ADDRESS = "ADDRESS"
CLONE = f"git clone {ADDRESS}"
TORCH = "pip install torch --index-url https://download.pytorch.org/whl/cpu"
FOLDER = "path/to/bge-reranker-base"
MAKE_FOLDER = f"""
from rerank_kernels.verify import load
model, tokenizer, *_ = load("shape:tiny")
model.save_pretrained({FOLDER!r}), tokenizer.save_pretrained({FOLDER!r})
"""
# of the caller's environment, what would change what the blocks do
LEFT_OUT = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "COLUMNS", "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
# no model may be fetched, pip must not leave the venv, and threads that wait leave a busy machine to others: no result changes
OURS = {
    "HF_HUB_OFFLINE": "1",
    "PIP_REQUIRE_VIRTUALENV": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "OMP_WAIT_POLICY": "passive",
}
RUN = ("bash", "python")


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str
    reason: str  # why it is not run, "" if it is


class Shown(NamedTuple):
    page: str
    line: int
    name: str
    text: str  # between the markers


@dataclass
class Ran:
    """What a block left: its stdout, and the folder it ran in."""

    stdout: str
    folder: Path


# ---- the page --------------------------------------------------------------------------------------------------------------

FENCED = re.compile(
    r"^(?:<!-- readme: not run, (?P<reason>[^\n]+) -->\n)?```(?P<language>[\w-]*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)


def parts(name: str, page: str) -> Iterator[Block | Shown]:
    """The blocks of the page and what it shows of their output, in order."""
    begin, line = 0, 1
    for shown in pages.blocks(page, "readme"):
        if shown.name not in NAMES:
            raise Wrong(f"{name}:{shown.line}: there is no readme:{shown.name}; there are {', '.join(NAMES)}")
        yield from _blocks(name, page[begin : shown.begin], line)
        yield Shown(name, shown.line, shown.name, shown.text)
        begin, line = shown.end, shown.line + 1 + shown.text.count("\n")
    yield from _blocks(name, page[begin:], line)


def _blocks(name: str, between: str, first: int) -> Iterator[Block]:
    """Of a part of the page that begins on line `first`."""
    for found in FENCED.finditer(between):
        line = between.count("\n", 0, found.start()) + first
        block = Block(name, line, found["language"], found["text"], found["reason"] or "")
        if block.language not in RUN and not block.reason:
            raise Wrong(
                f"{name}:{line}: this block is neither run ({', '.join(RUN)}) nor what one printed (<!-- readme:output -->) "
                "nor left out for a reason (<!-- readme: not run, REASON -->)"
            )
        yield block
    if left := re.search(r"^```.*$|<!-- readme: .*", FENCED.sub("", between), re.MULTILINE):
        raise Wrong(f"{name}, below line {first}: {left[0]!r} has no beginning or no end")


def fenced(text: str) -> str:
    """What was printed as a block, without the blanks that end a line and that nobody sees."""
    lines = [line.rstrip() for line in text.rstrip("\n").split("\n")]
    return "\n".join(("```", *lines, "```", ""))


# ---- what is shown, and what of it is held ---------------------------------------------------------------------------------


def all_of_it(text: str) -> list[str]:
    return text.splitlines()


def demo_held(text: str) -> list[str]:
    """Our column and its count. Stock's hashes are those of one machine: they must be several, and are only shown."""
    held = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("│")]
        if len(cells) != 5:
            held.append(re.sub(r"[━─]+", "-", line))
        elif cells[1] == "different hashes":
            held += [f"{cells[1]}: {cells[2]}", f"stock's are several: {cells[3].isdecimal() and int(cells[3]) > 1}"]
        else:
            held.append(f"{cells[1]}: {cells[2]}")
    return held


CHANGES = {  # check of verify -> what changes, as the page calls it
    "batch": "size of the batch (2, 3, 7, 8, 16, 31, 64)",
    "neighbours": "the other texts of the batch",
    "padding length": "padded length",
    "padding side": "padding on the left",
    "threads": "number of threads",
}


def changes(ran: Ran) -> str:
    """What `verify --json verify.json --html ...` measured: stock, which it measures for the page, beside ours."""
    found: dict[str, Any] = json.loads((ran.folder / "verify.json").read_text())
    ours, stock = ({c["check"]: c for c in of["checks"]} for of in (found, found["stock"]))
    rows = []
    for check, name in CHANGES.items():
        s, o = stock[check], ours[check]
        largest = "not a number" if s["max_difference"] is None else f"{s['max_difference']:.2g}"
        equal, swapped = (f"{n:,} of {of:,}" for n, of in ((s["equal"], s["total"]), (s["flips"], s["ordered"])))
        rows.append((name, equal, largest, swapped, f"{o['equal']:,} of {o['total']:,}"))
    heads = ("what changes", "stock: bits equal", "largest difference", "pairs of documents that swap", "patched: bits equal")
    about = found["environment"]
    python = ".".join(about["python"].split(".")[:2])
    texts = f"{found['rows']} docstrings of Python {python}, {found['shortest']} to {found['longest']} tokens"
    machine = f"{about['machine']}, torch {about['torch']}"
    return f"{pages.markdown(heads, rows)}\n(float32, {texts}; {machine})\n"


def changes_held(text: str) -> list[str]:
    """All but stock's numbers, which are those of one machine, and the machine."""
    held = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        held.append(" | ".join((cells[1], cells[-2])) if len(cells) > 2 else line.partition(";")[0])
    return held


# NAME -> how it is made of what the block before it left, and what of it must be so on every machine
NAMES: dict[str, tuple[Callable[[Ran], str], Callable[[str], list[str]]]] = {
    "output": (lambda ran: fenced(ran.stdout), all_of_it),
    "demo": (lambda ran: fenced(ran.stdout), demo_held),
    "changes": (changes, changes_held),
}


def difference(shown: Shown, made: str) -> str:
    """What of `shown` is not as it was made; "" if all that is held is."""
    held = NAMES[shown.name][1]
    page, run = held(shown.text), held(made)
    return "\n".join(difflib.unified_diff(page, run, f"{shown.page}:{shown.line}", "the run", lineterm="", n=0))


# ---- running ---------------------------------------------------------------------------------------------------------------


class Shell:
    """Runs blocks in one folder, and keeps the environment that a bash block leaves: an activated venv, a `cd`."""

    def __init__(self, folder: Path, environment: Mapping[str, str], scratch: Path) -> None:
        self.environment, self.scratch = {**environment, "PWD": str(folder)}, scratch

    def run(self, block: Block) -> Ran:
        folder = Path(self.environment["PWD"])
        state = self.scratch / "state"
        if block.language == "bash":
            command = ["bash", "-e", "-o", "pipefail", "-c", f"{block.text}\nenv -0 > {shlex.quote(str(state))}"]
        else:
            program = (
                folder / f"{Path(block.page).stem}_{block.line}.py"
            )  # beside what the block before left, as a reader would have it
            program.write_text(block.text)
            command = ["python", program.name]
        ran = subprocess.run(command, cwd=folder, env=self.environment, stdout=subprocess.PIPE, text=True, check=False)
        if ran.returncode:
            raise Wrong(f"{block.page}:{block.line}: exit code {ran.returncode}\n{block.text}{ran.stdout}")
        if block.language == "bash":
            self.environment = dict(e.split("=", 1) for e in state.read_text().split("\0") if "=" in e)
        return Ran(ran.stdout, Path(self.environment["PWD"]))


def repository(place: Path) -> None:
    """A repository at `place` of the files that lie here, whether they were committed or not; .gitignore says which."""
    environment = {k: v for k, v in os.environ.items() if k not in LEFT_OUT}
    environment |= {"GIT_DIR": str(place), "GIT_WORK_TREE": str(ROOT)}
    who = ("-c", "user.name=readme", "-c", "user.email=readme@localhost", "-c", "commit.gpgsign=false")
    for arguments in (("init", "-q"), ("add", "-A"), (*who, "commit", "-q", "-m", "what lies here")):
        subprocess.run(["git", *arguments], cwd=ROOT, env=environment, check=True)


def as_run(text: str, address: str, torch: str | None) -> str:
    """A bash block with the two substitutions that the first lines of this file speak of."""
    text = text.replace(CLONE, f"git clone {shlex.quote(address)}")
    return text if torch is None else text.replace(TORCH, f"pip install {shlex.join(shlex.split(torch))}")


def follow(
    given: Mapping[str, str], shell: Shell, address: str, torch: str | None, say: Callable[[str], None]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Runs the pages' blocks; page -> block -> what it should show, and what is wrong with what it does show."""
    found = [part for name, page in given.items() for part in parts(name, page)]  # an error is known before an hour's work
    commands = "".join(b.text for b in found if isinstance(b, Block) and b.language == "bash" and not b.reason)
    for wanted in (CLONE, TORCH):
        if wanted not in commands:
            raise Wrong(f"{', '.join(given)}: no block says `{wanted}`")
    ran, wrong = None, []
    contents: dict[str, dict[str, str]] = {name: {} for name in given}
    for part in found:
        if isinstance(part, Shown):
            if ran is None:
                raise Wrong(f"{part.page}:{part.line}: no block ran before readme:{part.name}")
            made = NAMES[part.name][0](ran)
            if differs := difference(part, made):
                wrong.append(differs)
            contents[part.page][part.name] = made
        elif not part.reason:
            block = part
            if block.language == "bash":
                block = block._replace(text=as_run(block.text, address, torch))
            elif FOLDER in block.text and not (Path(shell.environment["PWD"]) / FOLDER).exists():
                shell.run(block._replace(text=MAKE_FOLDER))
            since = time.monotonic()
            say(f"{part.page}:{part.line}: {part.language}\n" + "".join(f"  {line}\n" for line in block.text.splitlines()))
            ran = shell.run(block)
            say(f"  {time.monotonic() - since:.0f} s\n")
    return contents, wrong


def picture(page: Path) -> str:
    """Draws the top of a page of verify, verdict and plot; says why not where there is no browser."""
    if reason := browser.missing():
        return f"{PICTURE.name} is as it was: {reason}"
    with browser.Browser() as shown:
        shown.open(page, 760)
        shown.screenshot(PICTURE, ".plot")
    return f"{PICTURE.name}: {PICTURE.stat().st_size // 1024} KiB"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Follows the README to the letter, and holds what it prints against the page.")
    parser.add_argument("--write", action="store_true", help="put what the blocks print into the page")
    parser.add_argument("--torch", metavar="REQUIREMENT", help="what pip is given to install PyTorch (default: as printed)")
    args = parser.parse_args(argv)

    def say(text: str) -> None:
        print(text, end="", flush=True)

    given = {name: (ROOT / name).read_text() for name in PAGES}
    with tempfile.TemporaryDirectory(prefix="readme") as name:
        scratch = Path(name)
        (folder := scratch / "empty").mkdir()
        environment = {k: v for k, v in os.environ.items() if k not in LEFT_OUT and not k.startswith("RERANK_KERNELS_")} | OURS
        address = scratch / "origin"
        try:
            repository(address)
            say(f"not as printed: {ADDRESS} is {address}" + (f", torch is {args.torch}\n" if args.torch else "\n"))
            shell = Shell(folder, environment, scratch)
            contents, wrong = follow(given, shell, str(address), args.torch, say)
            if args.write:
                say(f"{picture(Path(shell.environment['PWD']) / 'verify.html')}\n")
        except Wrong as error:
            say(f"{error}\n")
            return 1
    left_out = [b for name in given for b in parts(name, given[name]) if isinstance(b, Block) and b.reason]
    for block in left_out:
        say(f"{block.page}:{block.line}: not run, {block.reason}\n")
    if args.write:
        for name, made in contents.items():
            pages.write(ROOT / name, "readme", made)
        return 0
    for differs in wrong:
        say(f"{differs}\n")
    say(
        f"{', '.join(PAGES)}: {f'{len(wrong)} outputs are not as shown; --write puts them in' if wrong else 'all as printed'}\n"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
