"""The threads of the cpu backend: its own pool (csrc/cpu/pool.cpp), forked children, many callers, and what PyTorch may start.

Which bits come out at which number of threads is held by the promise thread-invariant; here is everything else about them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import models
import rerank_kernels as rk
from conftest import require
from invariants import same, with_threads
from rerank_kernels.backend import library

TESTS = Path(__file__).parents[1]
POOL = TESTS.parent / "csrc" / "cpu" / "pool.cpp"


@pytest.fixture(autouse=True)
def _cpu() -> None:
    require("cpu")


# ---- the pool by itself -----------------------------------------------------------------------------------------------------

# What is taken out of pool.cpp, and the way in which the program below must notice it.
DEFECTS = {
    "the caller does not wait for those inside": ("if (alone() || spin(alone)) return;", "return;", "thread"),
    "a job stays on the list": ("*at = job.next;", ";", "address"),
    "the list is read without its lock": (
        "        const std::lock_guard lock(open_);\n        for (Job* job",
        "        for (Job* job",
        "thread",
    ),
    "leaving orders nothing": ("fetch_sub(1, std::memory_order_release)", "fetch_sub(1, std::memory_order_relaxed)", "thread"),
    "a forked child keeps its parent's pool": ("the_pool.store(nullptr); });", "});", "fork"),
}


def run_pool(tmp_path: Path, way: str, source: str) -> subprocess.CompletedProcess[str]:
    """tests/pool.cpp with `source` for csrc/cpu/pool.cpp; way: a sanitizer, or fork."""
    compiler = os.environ.get("CXX", "c++")
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    shutil.copy(TESTS / "pool.cpp", tmp_path / "tests")
    for header in POOL.parent.glob("*.h"):
        shutil.copy(header, tmp_path / "csrc" / "cpu")
    (tmp_path / "csrc" / "cpu" / "pool.cpp").write_text(source)
    flags = ["-std=c++20", "-O1", "-g", "-pthread"] + ([] if way == "fork" else [f"-fsanitize={way}"])
    program = tmp_path / "pool"
    subprocess.run([*compiler.split(), *flags, str(tmp_path / "tests" / "pool.cpp"), "-o", str(program), "-ldl"], check=True)
    try:
        return subprocess.run([str(program), way], capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess([], 1, "", "no end")


@pytest.mark.parametrize("way", ["thread", "address", "fork"])
def test_the_pool(tmp_path: Path, way: str) -> None:
    done = run_pool(tmp_path, way, POOL.read_text())
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_of_the_pool_is_seen(tmp_path: Path, defect: str) -> None:
    there, instead, way = DEFECTS[defect]
    source = POOL.read_text()
    assert source.count(there) == 1
    done = run_pool(tmp_path, way, source.replace(there, instead))
    assert done.returncode != 0


# ---- a model's forward ------------------------------------------------------------------------------------------------------


def encoder(**changes: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Patched, with a batch from which PyTorch's own operations would be shared out among its threads (32,768 numbers on)."""
    model = models.tiny("bert", head=False, **changes)
    rk.patch(model)
    ids = torch.randint(5, models.VOCABULARY, (16, 100), generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Watching(TorchDispatchMode):
    """How many threads PyTorch would take for each of its own operations, and ours for each of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.theirs: set[int] = set()
        self.ours: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "rerank_kernels":
            self.ours.add(library.threads())
        else:
            self.theirs.add(torch.get_num_threads())
        return function(*args, **(kwargs or {}))


def test_within_a_forward_pytorch_keeps_to_one_thread() -> None:
    """Else its OpenMP threads spin on the cores that ours want, and a forked child waits for them for ever."""
    model, batch = encoder()

    def run() -> Watching:
        with Watching() as watching:
            model(**batch)
        assert torch.get_num_threads() == library.threads() == 3, "given back"
        with pytest.raises(ValueError, match="input_ids must be"):
            model(input_ids=torch.full((1, 4), models.VOCABULARY))
        assert torch.get_num_threads() == library.threads() == 3, "given back after an error"
        return watching

    watching = with_threads(3, run)
    assert watching.theirs == {1}
    assert watching.ours == {3}


def test_one_threads_hold_is_no_other_threads() -> None:
    seen: list[int] = []

    def run() -> None:
        torch.empty(0)  # a new thread learns PyTorch's number at its first operation
        with library.holding_threads(), library.holding_threads():
            assert torch.get_num_threads() == 1 and library.threads() == 3
            other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            other.start()
            other.join()
        assert torch.get_num_threads() == 3

    with_threads(3, run)
    assert seen == [3]


def test_a_backend_that_needs_pytorchs_threads_keeps_them() -> None:
    model, batch = encoder()
    rk.unpatch(model)
    rk.patch(model, backend="pytorch")
    with Watching() as watching:
        with_threads(3, lambda: model(**batch))
    assert watching.theirs == {3}


def test_many_callers_at_once() -> None:
    """Eight threads of a program, one pool: each gets the bits that it gets alone."""
    model, batch = encoder()
    parts = [{name: t[i : i + 2] for name, t in batch.items()} for i in range(0, 16, 2)]
    alone = [model(**part).last_hidden_state for part in parts]
    wrong: list[str] = []

    def call(i: int) -> None:
        for turn in range(20):
            if not torch.equal(model(**parts[i]).last_hidden_state.view(torch.int32), alone[i].view(torch.int32)):
                wrong.append(f"caller {i}, turn {turn}")

    def run() -> None:
        callers = [threading.Thread(target=call, args=(i,)) for i in range(len(parts))]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()

    with_threads(3, run)
    assert not wrong
    same(model(**parts[0]).last_hidden_state, alone[0], "afterwards")


# ---- fork -------------------------------------------------------------------------------------------------------------------

FORK = """
import os, sys, threading, torch
torch.set_num_threads(3)
sys.path.insert(0, sys.argv[1])
import rerank_kernels as rk
import models, test_threads
torch.use_deterministic_algorithms(False)  # conftest.py's NaN are written by OpenMP, which a forked child waits for for ever
tokenizer = models.tokenizer("bert")
model, batch = test_threads.encoder(vocab_size=len(tokenizer))
x, w = torch.randn(300, 512), torch.randn(700, 512)
reranker = rk.Reranker(model, tokenizer, kind="embedding")
pairs = [(text, f"{text} {i}") for i, text in enumerate(models.CORPUS * 60)]  # so many that PyTorch would share out the cosines

def answers():
    ops = rk.linear(x, w), rk.softmax(x), model(**batch).last_hidden_state
    return [*(t.numpy().tobytes() for t in ops), reranker.score(pairs).logit.tobytes()]

before = answers()
stop = threading.Event()
work = [lambda: rk.linear(x, w), lambda: reranker.score(pairs[:9])]  # the second holds the tokenizer's lock most of the time
busy = [threading.Thread(target=lambda run=run: [run() for _ in iter(stop.is_set, True)]) for run in work]
for thread in busy: thread.start()
for child in range(6):
    pid = os.fork()
    if pid == 0:
        same = answers() == before and rk.backend.library.threads() == 3
        threads = len(os.listdir("/proc/self/task"))
        os._exit(0 if same and threads > 1 else 1)
    if os.waitpid(pid, 0)[1]: sys.exit(f"child {child} has other bits, or one thread")
stop.set()
for thread in busy: thread.join()
print("done")
"""


def test_a_forked_child_computes() -> None:
    """A server that loads the model, answers once, and forks its workers (gunicorn --preload, multiprocessing)."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORK), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


# ---- binding ----------------------------------------------------------------------------------------------------------------

BOUND = """
import os, time, torch, rerank_kernels as rk
torch.set_num_threads(2)
x = torch.randn(300, 512)
rk.linear(x, torch.randn(700, 512))
end = time.monotonic() + 20
while True:  # on a busy machine the thread may get a core, and say which it may use, after the caller has done all of the work
    cores = sorted(len(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task"))
    if cores[-1] > 1 or time.monotonic() > end:
        break
    time.sleep(0.01)
print(cores)
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: there is nothing to bind")
def test_a_caller_that_openmp_binds_does_not_bind_the_pool() -> None:
    """With OMP_PROC_BIND the first thread has one core, and whatever it starts would have that core too."""
    bound = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores", "PYTHONPATH": str(TESTS.parent)}
    done = subprocess.run([sys.executable, "-c", BOUND], capture_output=True, text=True, env=os.environ | bound, timeout=60)
    assert done.returncode == 0, done.stderr
    few, *_, many = map(int, done.stdout.strip("[]\n").split(", "))
    assert few == 1 and many == len(os.sched_getaffinity(0))
