"""`rerank-kernels infinity-server`: Infinity's own server and command line, with every engine patched before its first request.

An engine is patched where the server starts it, after its models are loaded. For that the class's own astart() is wrapped: this
process is the server's, and nothing else runs in it.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

from rerank_kernels.backend import registry
from rerank_kernels.patching.patch import patch

INSTALL = 'infinity-server: infinity_emb is not installed; run: pip install "infinity_emb[torch,server]"'


def serve(arguments: list[str], mode: str, backend: str | None, graphs: bool = True) -> int:
    """Run infinity_emb's command line until it ends; its exit code. Raises what patch raises if an engine cannot be patched."""
    try:
        from infinity_emb import cli
        from infinity_emb.engine import AsyncEmbeddingEngine
        from infinity_emb.log_handler import logger
    except ImportError as error:
        raise ModuleNotFoundError(f"{INSTALL} ({error})") from error
    if backend is not None:  # before the models are loaded
        registry.get(backend, f"--backend {backend}")
    refused: list[Exception] = []
    start = AsyncEmbeddingEngine.astart

    async def astart(engine: Any) -> None:
        try:
            report = patch(engine, mode, backend=backend, graphs=graphs)
        except Exception as error:
            refused.append(error)
            raise
        what = ", ".join(f"{path} ({report.replaced[path]})" for path in report.forwards if path in report.replaced)
        logger.info("rerank_kernels: %s, mode %s: %s", engine.engine_args.served_model_name, mode, what)
        await start(engine)

    AsyncEmbeddingEngine.astart = astart
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the server has its own way to end, and falls back to this one
    sys.argv = ["infinity_emb", *arguments]
    try:
        cli.cli()
    except SystemExit as end:
        if refused:
            raise refused[0] from None
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
