// cudart.h: what the stand-in for the CUDA runtime knows about an op's memory.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {
struct ptxsim_memory {
    uint64_t address, bytes;
    int32_t writable, padding;
};
void ptxsim_begin();  // an op begins: forget the memory of the one before, unless it called this one
void ptxsim_end();
extern int ptxsim_poison;  // the byte that new tensors are filled with
// Which device it is, and what it says of itself: its compute capability, 80 or 90, and how many multiprocessors it has.
extern int ptxsim_device, ptxsim_capability, ptxsim_multiprocessors;
extern int ptxsim_maps;  // 0: its driver refuses each tensor map
void ptxsim_note(const void* address, size_t bytes, int writable);
}
