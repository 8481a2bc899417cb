// launch.cuh: starting a kernel, with the errors said, and the launchers' choices, which a test can force. Included by a room's
// room.cuh, which says first what MAX_SHARED is there.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "kernels.h"

namespace rk {

inline void check_cuda(cudaError_t code, const char* op, const char* what) {
    if (code == cudaSuccess) return;
    throw std::runtime_error(std::string(op) + ": " + what + " failed: " + cudaGetErrorString(code) + " (" +
                             cudaGetErrorName(code) + ")");
}

// The first dimension of a grid; the others take 65,535 at most, and the runtime says so.
inline unsigned checked_blocks(const char* op, int64_t blocks) {
    if (blocks > 0x7fffffff)
        throw std::runtime_error(std::string(op) + ": more blocks than a grid can have; call it on fewer rows");
    return unsigned(blocks);
}

// Starts kernel(args...) on the stream; nothing waits, nothing is allocated, so a CUDA graph can capture it. A grid without
// blocks is no launch: an op on no rows is not an error. Static: a room's instance has that room's MAX_SHARED.
template <class... P, class... A>
static void launch(const char* op, void (*kernel)(P...), dim3 grid, int threads, size_t shared, Stream stream, A&&... args) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    if (shared > 48 * 1024)  // more than the default must be asked for; always the same, since another thread may do it too
        check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        MAX_SHARED),
                   op, "asking for shared memory");
    kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(std::forward<A>(args)...);
    check_cuda(cudaGetLastError(), op, "starting a kernel");
}

}  // namespace rk
