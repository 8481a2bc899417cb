"""One step's work, in its own process: python tools/gpu_report/work NAME [ARGUMENT ...]. It prints lines of JSON: `cases`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent.parent
sys.path.pop(0)  # this folder, whose names are not for everyone
sys.path += [str(ROOT), str(ROOT / "tests")]  # last: PYTHONPATH says which build of the package is meant

if __name__ == "__main__":
    importlib.import_module(f"tools.gpu_report.work.{sys.argv[1]}").main(*sys.argv[2:])
