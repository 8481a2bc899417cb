"""Times beside others': run.py is the command. cases/ is what is timed, rivals/ beside what, harness/ the one clock and the one
worker, pages/ what is made of a run's file. The cases' truths and the gate's invariants are the tests' own: there is one table.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = ROOT / "bench" / "out"
sys.path += [str(folder) for folder in (ROOT, ROOT / "tests") if str(folder) not in sys.path]
