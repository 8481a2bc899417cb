"""In which order does an op add? What `rerank-kernels order` prints: sums.py gives an op's sum, reveal.py finds its tree."""
