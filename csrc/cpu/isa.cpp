// isa.cpp: which instruction set the kernels use. One answer for every op and shape: the CPU's best, or what a test forced.

#include <cstdlib>
#include <string>

#include "launch.h"

namespace rk {

Isa best_isa() {
#ifdef __x86_64__
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return Isa::AVX512;
    if (avx2) return Isa::AVX2;
#endif
    return Isa::SCALAR;
}

static std::atomic<Isa> in_force{best_isa()};

Isa isa() { return in_force.load(std::memory_order_relaxed); }
void force_isa(Isa wanted) { in_force.store(wanted); }

static const char* name_of(Isa i) { return i == Isa::AVX512 ? "avx512" : i == Isa::AVX2 ? "avx2" : "scalar"; }

static std::string force_isa_op(std::string name) {
    if (!name.empty()) {
        const bool known = name == "auto" || name == "avx512" || name == "avx2" || name == "scalar";
        RK_CHECK(known, "force_isa", "name must be auto, avx512, avx2 or scalar, got ", name.c_str());
        const Isa wanted = name == "auto"     ? best_isa()
                           : name == "avx512" ? Isa::AVX512
                           : name == "avx2"   ? Isa::AVX2
                                              : Isa::SCALAR;
        RK_CHECK(wanted <= best_isa(), "force_isa", "this CPU has no ", name.c_str(), "; its best is ", name_of(best_isa()));
        force_isa(wanted);
    }
    return name_of(isa());
}

STABLE_TORCH_LIBRARY_IMPL(rerank_kernels, CompositeExplicitAutograd, m) { m.impl("force_isa", TORCH_BOX(&force_isa_op)); }

}  // namespace rk
