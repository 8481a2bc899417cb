"""What the compilers make of the kernels, read from PTX and machine code on a machine without a GPU.

    python tools/witness                    # the rules, for every kernel on every architecture; exit status 1 if one is broken
    python tools/witness --check            # the same, and docs/GPU.md is what --write would write
    python tools/witness --write            # the same, and writes the generated parts of docs/GPU.md
    python tools/witness triton --arch 90   # one backend, one architecture

The rules, each a consequence of NUMERICS.md:
- PTX holds nothing outside the contract (`outside_contract`): arithmetic is float32 and .rn, nothing approximate, no tensor
  core, no atomic, and nothing that asks which multiprocessor it runs on or what time it is. The kernels of csrc/cuda/sm80/
  have tensor cores, by one instruction only: mma.sync.m16n8k16 with float32 sums.
- ptxas does not fuse what PTX holds apart. An FFMA may come from a PTX fma or from the inside of a division or square root, so
  counting says little. Instead the PTX is dyed: every fma.rn becomes fma.rz, and divisions, reciprocals and square roots become
  instructions that need no FFMA. Then every FFMA must be an FFMA.RZ: one without the dye is a product and a sum that ptxas
  fused. (Take the .rn from PTX's mul and add, and it does: test_witness.py.)
- Machine code holds no local memory (spills, arrays with computed indices), no atomics, and tensor cores where they belong.
- Kernels that stream move 16 bytes per instruction.

CUDA's kernels are compiled by nvcc and ptxas from csrc/cuda. Triton's are compiled as the backend's own calls ask for them,
assembled by the ptxas that Triton brings, with the flags that Triton gives it, and disassembled. For them mode portable has the
same rules. A kernel of mode tensor has tensor cores, all of one kind (HMMA, on Hopper HGMMA), and keeps the other rules. Shared
memory is at most 99 KB per block; on Hopper, where mode tensor has tiles of its own, 227 KB.

`ptx` `machine`: what a text holds. `kernels`: one CUDA kernel and its defects. `launches` `occupancy` `page`: docs/GPU.md.
`triton_calls` `triton_kernels` `triton_page`: the same for Triton.
"""
