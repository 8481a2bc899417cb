// detect.h: the best instruction set that this CPU has. No torch header: host.cpp asks too.
#pragma once

#ifdef __x86_64__
#include <cpuid.h>
#endif

#include "types.h"

namespace rk {

inline Isa detect_isa() {
#ifdef __x86_64__
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & (1u << 29)) != 0;  // clang 14 does not know it by name
    __builtin_cpu_init();
    const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return Isa::AVX512;
    if (avx2) return Isa::AVX2;
#endif
    return Isa::SCALAR;
}

}  // namespace rk
