// library.h: under which name the ops are registered, and how a file registers its own. tests/ptxsim compiles the CUDA side a
// second time under another name and for CPU tensors, with kernels that run in a simulator; nothing else sets these.
//
//     RK_TORCH_LIBRARY(m) { m.def("..."); }                   once, in schema.cpp
//     RK_TORCH_LIBRARY_IMPL(CPU, m) { m.impl("...", ...); }   at most once a file
//
// In place of STABLE_TORCH_LIBRARY and STABLE_TORCH_LIBRARY_IMPL: those of PyTorch 2.10 take RK_LIBRARY itself for the name,
// and all of them end the process with a segmentation fault where a second copy of the library is loaded.
#pragma once

#include <torch/csrc/stable/library.h>

#include <memory>

#ifndef RK_LIBRARY
#define RK_LIBRARY rerank_kernels
#endif

namespace rk {

// Whether no other copy of this library has registered the ops in this process; a second one stays idle (schema.cpp). The CUDA
// library has no schema: it adds kernels to ops that are there.
#ifdef USE_CUDA
constexpr bool first_copy() { return true; }
#else
bool first_copy();
#endif
const char* loaded_from();  // this library's file

using Registered = torch::stable::detail::StableTorchLibraryInit;
using Registry = torch::stable::detail::StableLibrary;

}  // namespace rk

#define RK_STRING_OF(text) #text
#define RK_STRING(name) RK_STRING_OF(name)

#define RK_TORCH_LIBRARY(m) RK_REGISTER(DEF, nullptr, m)
#define RK_TORCH_LIBRARY_IMPL(key, m) RK_REGISTER(IMPL, RK_STRING(key), m)
#define RK_REGISTER(kind, key, m)                                                                                          \
    static void register_here(rk::Registry&);                                                                              \
    static const std::unique_ptr<rk::Registered> registered_here(                                                          \
        rk::first_copy()                                                                                                   \
            ? new rk::Registered(rk::Registry::Kind::kind, &register_here, RK_STRING(RK_LIBRARY), key, __FILE__, __LINE__) \
            : nullptr);                                                                                                    \
    static void register_here(rk::Registry& m)
