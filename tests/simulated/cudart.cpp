// cudart.cpp: a stand-in for the CUDA runtime. The launchers of csrc/cuda are compiled by nvcc as they are and linked with
// this instead of libcudart: what they would send to a driver, grid, block, shared memory and arguments, is handed to
// Python, which runs the kernel's PTX in the simulator. Only what nvcc's host code and the launchers call is here.

#include "cudart.h"

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "../ptxsim/machine/tensormap.h"

namespace {

struct Size {
    unsigned x, y, z;
};
struct Configuration {
    Size grid, block;
    size_t shared;
    void* stream;
};
struct Kernel {
    std::string name;
    int allowed_shared = 48 * 1024;  // more must be asked for, as on a GPU
};

std::map<const void*, Kernel> kernels;
std::vector<Configuration> configurations;
std::vector<ptxsim_memory> memory;
int depth = 0, last_error = 0;

enum { SUCCESS = 0, INVALID_VALUE = 1, LAUNCH_FAILURE = 719, NOT_FOUND = 98 };
// Of a block: the smallest limit of sm_80 to sm_120, but for what only a Hopper runs.
int most_shared() { return (ptxsim_capability == 90 ? 227 : 99) * 1024; }

using Launch = int (*)(const char* name, const unsigned* grid, const unsigned* block, uint64_t shared, void** arguments,
                       const ptxsim_memory* memory, uint64_t count);
Launch in_python = nullptr;

// cuTensorMapEncodeTiled, as far as the simulator knows tensor maps (ptxsim/machine/tensormap.h). It refuses what the driver
// refuses: see the driver API's page.
int encode_tiled(ptxsim::TensorMap* made, int type, unsigned rank, void* address, const uint64_t* sizes,
                 const uint64_t* strides, const unsigned* box, const unsigned* steps, int interleave, int swizzle, int,
                 int fill) {
    constexpr uint8_t ELEMENT_BYTES[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2};  // u8 u16 u32 s32 u64 s64 f16 f32 f64 bf16
    const auto number = [](const void* p) { return reinterpret_cast<uint64_t>(p); };
    if (!ptxsim_maps || number(made) % 64 || type < 0 || type > 9 || rank < 1 || rank > 5 || number(address) % 16)
        return INVALID_VALUE;
    if (interleave != 0 || swizzle < 0 || swizzle > 3 || fill != 0) return INVALID_VALUE;
    ptxsim::TensorMap m{};
    m.magic = ptxsim::TensorMap::MAGIC;
    m.element_bytes = ELEMENT_BYTES[type], m.rank = uint8_t(rank), m.swizzle = uint8_t(swizzle), m.address = number(address);
    const unsigned inner = box[0] * m.element_bytes;
    if (inner % 16 || (swizzle && inner > 16u << swizzle)) return INVALID_VALUE;
    for (unsigned i = 0; i < rank; i++) {
        if (sizes[i] < 1 || sizes[i] > uint64_t(1) << 32 || box[i] < 1 || box[i] > 256 || steps[i] != 1) return INVALID_VALUE;
        m.last[i] = uint32_t(sizes[i] - 1), m.box[i] = uint16_t(box[i]);
        if (i + 1 == rank) break;
        if (strides[i] % 16 || strides[i] >= uint64_t(1) << 40) return INVALID_VALUE;
        m.strides[i] = strides[i];
    }
    *made = m;
    return SUCCESS;
}

int failed(int code) {
    last_error = code;
    return code;
}

}  // namespace

extern "C" {

// ---- for Python and for the ops

int ptxsim_poison = 0xff, ptxsim_device = 0, ptxsim_capability = 80, ptxsim_multiprocessors = 108, ptxsim_maps = 1;

void ptxsim_connect(Launch launch) { in_python = launch; }

void ptxsim_begin() {
    if (depth++ == 0) memory.clear();
}
void ptxsim_end() { --depth; }
void ptxsim_note(const void* address, size_t bytes, int writable) {
    if (bytes == 0) return;
    const uint64_t at = reinterpret_cast<uint64_t>(address);
    for (ptxsim_memory& m : memory)
        if (m.address == at && m.bytes == bytes) {  // one launch wrote it, the next one reads it
            m.writable |= writable;
            return;
        }
    memory.push_back({at, bytes, writable, 0});
}

// ---- what nvcc's host code calls

void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
    kernels[host].name = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(Size grid, Size block, size_t shared, void* stream) {
    configurations.push_back({grid, block, shared, stream});
    return 0;
}
int __cudaPopCallConfiguration(Size* grid, Size* block, size_t* shared, void* stream) {
    const Configuration c = configurations.back();
    configurations.pop_back();
    *grid = c.grid;
    *block = c.block;
    *shared = c.shared;
    *static_cast<void**>(stream) = c.stream;
    return SUCCESS;
}
int __cudaGetKernel(void** kernel, const void* host) {
    const auto found = kernels.find(host);
    if (found == kernels.end()) return failed(NOT_FOUND);
    *kernel = &found->second;
    return SUCCESS;
}
int __cudaLaunchKernel(void* kernel, Size grid, Size block, void** arguments, size_t shared, void*) {
    const Kernel& k = *static_cast<Kernel*>(kernel);
    const bool fits = grid.x && grid.y && grid.z && grid.y <= 65535 && grid.z <= 65535 && grid.x <= 0x7fffffff &&
                      uint64_t(block.x) * block.y * block.z - 1 < 1024 && shared <= size_t(k.allowed_shared);
    if (!fits || !in_python) return failed(INVALID_VALUE);
    const unsigned g[3] = {grid.x, grid.y, grid.z}, b[3] = {block.x, block.y, block.z};
    if (in_python(k.name.c_str(), g, b, shared, arguments, memory.data(), memory.size()) != 0) return failed(LAUNCH_FAILURE);
    return SUCCESS;
}
int cudaLaunchKernel(const void* host, Size grid, Size block, void** arguments, size_t shared, void* stream) {
    void* kernel;
    const int code = __cudaGetKernel(&kernel, host);
    return code ? code : __cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

// ---- what the launchers call

int cudaFuncSetAttribute(const void* host, int attribute, int value) {
    constexpr int max_dynamic_shared = 8;
    const auto found = kernels.find(host);
    if (found == kernels.end() || attribute != max_dynamic_shared || value > most_shared()) return failed(INVALID_VALUE);
    found->second.allowed_shared = value;
    return SUCCESS;
}
int cudaGetDevice(int* device) {
    *device = ptxsim_device;
    return SUCCESS;
}
int cudaDeviceGetAttribute(int* value, int attribute, int) {
    enum { MULTIPROCESSORS = 16, MAJOR = 75, MINOR = 76 };
    if (attribute == MULTIPROCESSORS) *value = ptxsim_multiprocessors;
    else if (attribute == MAJOR) *value = ptxsim_capability / 10;
    else if (attribute == MINOR) *value = ptxsim_capability % 10;
    else return failed(INVALID_VALUE);
    return SUCCESS;
}
int cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, unsigned long long, int* answer) {
    enum { FOUND = 0, NO_SUCH_SYMBOL = 1 };
    const bool known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
    *found = known ? reinterpret_cast<void*>(encode_tiled) : nullptr;
    if (answer) *answer = known ? FOUND : NO_SUCH_SYMBOL;
    return SUCCESS;
}
int cudaGetDriverEntryPoint(const char* name, void** found, unsigned long long flags, int* answer) {
    return cudaGetDriverEntryPointByVersion(name, found, 12000, flags, answer);
}
int cudaGetLastError() {
    const int code = last_error;
    last_error = SUCCESS;
    return code;
}
const char* cudaGetErrorString(int code) {
    return code == INVALID_VALUE ? "invalid argument"
           : code == NOT_FOUND   ? "invalid device function"
                                 : "the simulator found a defect";
}
const char* cudaGetErrorName(int code) {
    return code == INVALID_VALUE ? "cudaErrorInvalidValue"
           : code == NOT_FOUND   ? "cudaErrorInvalidDeviceFunction"
                                 : "cudaErrorLaunchFailure";
}
}
