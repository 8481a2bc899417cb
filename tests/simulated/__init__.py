"""The CUDA and Triton backends on a machine without a GPU: what binds rerank_kernels to ptxsim, which knows nothing of it."""
