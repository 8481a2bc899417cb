// each_isa.h: compiles the kernels of one file once per instruction set.
//
// A family file looks like this (RK_FILE names the file itself):
//
//     #ifndef RK_ISA
//     #define RK_FILE "norm.cpp"
//     #include "each_isa.h"          // comes back to the file three times, with RK_ISA = scalar, avx2, avx512
//     ... launchers and registration, once ...
//     #else
//     namespace rk { namespace RK_ISA { ... kernels over raw pointers, in terms of Vec ... } }
//     #endif
//
// One object file holds all three; isa() picks at run time, the same for every op, never by shape. Everything compiled for
// an instruction set lives in its own namespace with internal linkage: an inline function of the standard library compiled
// here for AVX-512 could otherwise be the copy that the linker keeps for all.

#include <cstdint>
#include <cstring>

#include "../args.h"
#include "types.h"

#define RK_ISA scalar
#define RK_ISA_SCALAR 1
#include "isa.h"
#include RK_FILE
#undef RK_ISA
#undef RK_ISA_SCALAR

#ifdef __x86_64__
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define RK_ISA avx2
#define RK_ISA_AVX2 1
#include "isa.h"
#include RK_FILE
#undef RK_ISA
#undef RK_ISA_AVX2
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define RK_ISA avx512
#define RK_ISA_AVX512 1
#include "isa.h"
#include RK_FILE
#undef RK_ISA
#undef RK_ISA_AVX512
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define RK_CALL(function, ...)                                              \
    (::rk::isa() == ::rk::Isa::AVX512 ? ::rk::avx512::function(__VA_ARGS__) \
     : ::rk::isa() == ::rk::Isa::AVX2 ? ::rk::avx2::function(__VA_ARGS__)   \
                                      : ::rk::scalar::function(__VA_ARGS__))
#else
#define RK_CALL(function, ...) ::rk::scalar::function(__VA_ARGS__)
#endif
