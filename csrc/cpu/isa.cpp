// isa.cpp: which instruction set the kernels use. One answer for every op and shape: the CPU's best, or what a test forced. And
// which numerics version they were compiled with, in which file.

#include <cstdlib>
#include <string>

#include "../numerics.h"
#include "detect.h"
#include "launch.h"

namespace rk {

Isa best_isa() { return detect_isa(); }

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

static int64_t numerics_version() { return NUMERICS_VERSION; }
static std::string build_info() { return std::string("compiler ") + __VERSION__ + "; " + RK_BUILD_FACTS; }
static std::string loaded_from_op() { return loaded_from(); }

RK_TORCH_LIBRARY_IMPL(CompositeExplicitAutograd, m) {
    m.impl("force_isa", TORCH_BOX(&force_isa_op));
    m.impl("numerics_version", TORCH_BOX(&numerics_version));
    m.impl("build_info", TORCH_BOX(&build_info));
    m.impl("loaded_from", TORCH_BOX(&loaded_from_op));
}

}  // namespace rk
