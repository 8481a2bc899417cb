"""The pure-PyTorch backend: no compiler, no GPU, the same seven family names as every other backend.

Promises, on one machine at one thread count: repeatable, batch-invariant, padding-invariant. It does not promise to be
thread-invariant or machine-invariant, because the matrix products inside are the BLAS of the installed torch.

Three rules keep the promises:
- a matrix product never sees M. Rows go through the BLAS in tiles of exactly 32, padded with zeros, into outputs padded to a
  multiple of 32 columns (linear.py). Attention multiplies matrices whose shape is the sequence's own length (attention.py);
- sums run in an order that is written down, out of element-wise IEEE adds (softmax.py, `row_sum`);
- of torch's element-wise functions only those are used whose result does not depend on where in the tensor an element stands.
  exp, tanh, erfc (vectors only, tail included) are such. sigmoid, silu and gelu are not: their last n % 16 elements take a
  scalar path with other bits (0.01 to 2 % of the elements, with torch 2.13 on AVX-512). So they are built from exp and erfc.
"""
