"""python -m rerank_kernels: the command line, where its script is not on PATH."""

import sys

from rerank_kernels.cli import main

sys.exit(main())
