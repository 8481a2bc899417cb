// room.cuh: what a kernel of this room may ask for, and whether a GPU is one that it is compiled for: sm_90a alone (toolkit.py,
// ROOMS), that is, compute capability 9.0.
#pragma once

namespace rk {

constexpr int MAX_SHARED = 227 * 1024;  // bytes of shared memory of one block

}  // namespace rk

#include "../launch.cuh"

namespace rk::sm90 {

// What a launcher of this room knows of the current device. Asking takes no time worth saving, and a process may have several.
struct Device {
    bool hopper;          // compute capability 9.0: the code of this room runs there, and nowhere else
    int multiprocessors;  // how many blocks a persistent kernel starts at most; in no output's expression
};

inline Device current_device(const char* op) {
    int device = 0, major = 0, minor = 0, count = 0;
    check_cuda(cudaGetDevice(&device), op, "asking for the current device");
    const auto ask = [&](int* value, cudaDeviceAttr what) {
        check_cuda(cudaDeviceGetAttribute(value, what, device), op, "asking for the device's properties");
    };
    ask(&major, cudaDevAttrComputeCapabilityMajor);
    ask(&minor, cudaDevAttrComputeCapabilityMinor);
    ask(&count, cudaDevAttrMultiProcessorCount);
    return {major == 9 && minor == 0, count};
}

}  // namespace rk::sm90
