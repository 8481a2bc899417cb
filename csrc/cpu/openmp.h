// openmp.h: the few functions of PyTorch's OpenMP that threads.cpp and pool.cpp ask. Not linked: which OpenMP it is (libgomp
// from the wheel, libiomp5 by LD_PRELOAD), or whether PyTorch has one at all, is known when the process runs.
#pragma once

#include <dlfcn.h>

namespace rk {

// The function of that name, null if there is none.
template <class F>
F openmp(const char* name) {
    return reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
}

}  // namespace rk
