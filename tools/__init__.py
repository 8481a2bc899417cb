"""Programs for who works on rerank_kernels: they check it, or write what the pages show. Nothing here is installed."""
