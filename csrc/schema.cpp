// schema.cpp: the library itself, and the ops that compute nothing. What a family computes has its signature beside its CPU
// kernel, at the end of csrc/cpu/<family>.cpp. Arguments are what rerank_kernels/ops/<family>.py has checked and laid out;
// weights are [N, K], contiguous, as nn.Linear holds them, but for sparse_ffn's (rerank_kernels/backend/weights.py).

#include <dlfcn.h>

#include <cstdio>

#include "library.h"

namespace rk {

const char* loaded_from() {
    Dl_info here{};
    return dladdr(reinterpret_cast<void*>(&loaded_from), &here) != 0 ? here.dli_fname : "a file that is not known";
}

bool first_copy() {
    static const bool first = [] {
        TorchLibraryHandle probe = nullptr;
        if (aoti_torch_library_init_def(RK_STRING(RK_LIBRARY), __FILE__, __LINE__, &probe) == AOTI_TORCH_SUCCESS) {
            aoti_torch_delete_library_object(probe);
            return true;
        }
        std::fprintf(stderr,
                     "rerank_kernels: %s is a second copy of the C++ library in this process; it stays idle, and the copy "
                     "that was loaded first goes on serving\n",
                     loaded_from());
        return false;
    }();
    return first;
}

}  // namespace rk

// clang-format off
RK_TORCH_LIBRARY(m) {
    // which instruction set the cpu kernels use: "auto", "avx512", "avx2", "scalar"; "" only asks. For tests and info.
    m.def("force_isa(str name) -> str");
    // makes PyTorch's own operations on this thread run on it alone; csrc/cpu/threads.cpp
    m.def("hold_threads(int count) -> int");
    // NUMERICS_VERSION of numerics.h: the Python side asks whether it is its own.
    m.def("numerics_version() -> int");
    // compiler, torch and flags, for info; the library's file, for the message about a second copy.
    m.def("build_info() -> str");
    m.def("loaded_from() -> str");
    // the tiles of mode tensor, room by room, as JSON; csrc/cpu/tables.cpp
    m.def("launch_tables() -> str");
    // the CUDA launchers that have several ways to serve a call, "linear 7, attention 2"; force_launch: which of them one takes,
    // -1 for its own choice. For tests and trials. open_room: whether a launcher of a room for one architecture may serve a
    // device; at first it may not.
    m.def("launchers() -> str");
    m.def("force_launch(str kernel, int way) -> str");
    m.def("open_room(str kernel, int device, bool open) -> bool");
}
