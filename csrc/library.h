// library.h: under which name the ops are registered, and how a file registers its own. tests/simulated compiles the CUDA side
// a second time under another name and for CPU tensors, with kernels that run in a simulator; nothing else sets these.
//
//     RK_TORCH_LIBRARY(m) { m.def("..."); }                   once, in schema.cpp: the ops that compute nothing
//     RK_OPS(m) { m.op("signature", TORCH_BOX(&kernel)); }    at the end of a family's file in csrc/cpu/; an op of mode tensor
//                                                             has a signature alone there
//     RK_TORCH_LIBRARY_IMPL(CUDA, m) { m.impl("...", ...); }  kernels of ops whose signature stands elsewhere
//
// Each at most once a file. In place of STABLE_TORCH_LIBRARY and its like: those of PyTorch 2.10 take RK_LIBRARY itself for the
// name, and all of them end the process with a segmentation fault where a second copy of the library is loaded.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <memory>
#include <string>

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

// What RK_OPS lists, gone through twice: PyTorch takes signatures and kernels in libraries of their own.
class Ops {
   public:
    using Kernel = void (*)(StableIValue*, uint64_t, uint64_t);
    Ops(Registry& registry, bool kernels) : registry_(registry), kernels_(kernels) {}
    void op(const char* signature, Kernel kernel = nullptr) {
        if (!kernels_) registry_.def(signature);
        else if (kernel) registry_.impl(std::string(signature, std::strchr(signature, '(')).c_str(), kernel);
    }

   private:
    Registry& registry_;
    const bool kernels_;
};

}  // namespace rk

#define RK_STRING_OF(text) #text
#define RK_STRING(name) RK_STRING_OF(name)

#define RK_TORCH_LIBRARY(m) RK_REGISTER(DEF, nullptr, m)
#define RK_TORCH_LIBRARY_IMPL(key, m) RK_REGISTER(IMPL, RK_STRING(key), m)
#define RK_OPS(m)                                                                           \
    static void list_ops(rk::Ops&&);                                                        \
    static void list_signatures(rk::Registry& r) { list_ops(rk::Ops(r, false)); }           \
    static void list_kernels(rk::Registry& r) { list_ops(rk::Ops(r, true)); }               \
    static const auto signatures_here = RK_REGISTERED(FRAGMENT, nullptr, &list_signatures); \
    static const auto kernels_here = RK_REGISTERED(IMPL, "CPU", &list_kernels);             \
    static void list_ops(rk::Ops&& m)
#define RK_REGISTERED(kind, key, list)                                                                                        \
    std::unique_ptr<rk::Registered>(                                                                                          \
        rk::first_copy() ? new rk::Registered(rk::Registry::Kind::kind, list, RK_STRING(RK_LIBRARY), key, __FILE__, __LINE__) \
                         : nullptr)
#define RK_REGISTER(kind, key, m)                                                 \
    static void register_here(rk::Registry&);                                     \
    static const auto registered_here = RK_REGISTERED(kind, key, &register_here); \
    static void register_here(rk::Registry& m)
