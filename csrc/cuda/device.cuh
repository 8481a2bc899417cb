// device.cuh: what every kernel needs besides numerics.h: storage dtypes, asynchronous copies into shared memory, warp folds.
//
// Kernels see raw pointers and numbers only; no torch header may come in here, so that `nvcc -ptx` alone compiles a family in
// a second and tests/ptxsim can run it. Compile with --fmad=false: where an fma is meant, numerics.h's fmadd says so.
#pragma once

#include <cuda_runtime.h>

#include "../args.h"
#include "../numerics.h"

namespace rk {

constexpr unsigned WARP = 0xffffffffu;

// ---- storage dtypes: widened exactly, rounded once ---------------------------------------------------------------------

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(f16 x) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
    return f;
}
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(unsigned(x.bits) << 16); }

template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ f16 narrow<f16>(float x) {
    f16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(x));
    return h;
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {
    bf16 h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h.bits) : "f"(x));
    return h;
}

// Two neighbours in one register, `a` in the lower half: each has the bits of narrow<T>.
template <class T>
__device__ __forceinline__ unsigned round_two(float a, float b);
template <>
__device__ __forceinline__ unsigned round_two<f16>(float a, float b) {
    unsigned both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(b), "f"(a));
    return both;
}
template <>
__device__ __forceinline__ unsigned round_two<bf16>(float a, float b) {
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(b), "f"(a));
    return both;
}

// Element i of an array whose dtype is known only at run time: for epilogues, where one instance serves every mix.
__device__ __forceinline__ float load_as(Dtype dtype, const void* p, int64_t i) {
    if (dtype == Dtype::F32) return static_cast<const float*>(p)[i];
    if (dtype == Dtype::F16) return widen(static_cast<const f16*>(p)[i]);
    return widen(static_cast<const bf16*>(p)[i]);
}
__device__ __forceinline__ void store_as(Dtype dtype, void* p, int64_t i, float x) {
    if (dtype == Dtype::F32) static_cast<float*>(p)[i] = x;
    else if (dtype == Dtype::F16) static_cast<f16*>(p)[i] = narrow<f16>(x);
    else static_cast<bf16*>(p)[i] = narrow<bf16>(x);
}
__device__ __forceinline__ float load_as(const Ref& from, int64_t i) { return load_as(from.dtype, from.data, i); }
__device__ __forceinline__ void store_as(const Out& to, int64_t i, float x) { store_as(to.dtype, to.data, i, x); }

// Four neighbours at once, of 16 bytes (float) or 8 bytes (half); the address must be a multiple of that.
struct Four {
    float v[4];
};
__device__ __forceinline__ Four load_four(const float* p) {
    const float4 x = *reinterpret_cast<const float4*>(p);
    return {{x.x, x.y, x.z, x.w}};
}
template <class Half>
__device__ __forceinline__ Four load_four(const Half* p) {
    const uint2 x = *reinterpret_cast<const uint2*>(p);
    return {{widen(Half{uint16_t(x.x)}), widen(Half{uint16_t(x.x >> 16)}), widen(Half{uint16_t(x.y)}),
             widen(Half{uint16_t(x.y >> 16)})}};
}
__device__ __forceinline__ void store_four(float* p, Four x) {
    *reinterpret_cast<float4*>(p) = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
}
template <class Half>
__device__ __forceinline__ void store_four(Half* p, Four x) {
    const unsigned a = narrow<Half>(x.v[0]).bits, b = narrow<Half>(x.v[1]).bits;
    const unsigned c = narrow<Half>(x.v[2]).bits, d = narrow<Half>(x.v[3]).bits;
    *reinterpret_cast<uint2*>(p) = make_uint2(a | b << 16, c | d << 16);
}

__device__ __forceinline__ Four load_four_as(Dtype dtype, const void* p, int64_t i) {
    if (dtype == Dtype::F32) return load_four(static_cast<const float*>(p) + i);
    if (dtype == Dtype::F16) return load_four(static_cast<const f16*>(p) + i);
    return load_four(static_cast<const bf16*>(p) + i);
}
__device__ __forceinline__ void store_four_as(Dtype dtype, void* p, int64_t i, Four x) {
    if (dtype == Dtype::F32) store_four(static_cast<float*>(p) + i, x);
    else if (dtype == Dtype::F16) store_four(static_cast<f16*>(p) + i, x);
    else store_four(static_cast<bf16*>(p) + i, x);
}

__host__ __device__ __forceinline__ bool aligned(const void* p, unsigned bytes) {
    return (reinterpret_cast<uint64_t>(p) & (bytes - 1)) == 0;
}

// ---- cp.async: global to shared memory without a register --------------------------------------------------------------

// 16 bytes, of which the first `valid` come from `from` and the rest are zeros. Both addresses are multiples of 16.
__device__ __forceinline__ void copy_16(void* to_shared, const void* from, int valid = 16) {
    const unsigned to = unsigned(__cvta_generic_to_shared(to_shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
}
// Likewise for 4 bytes: rows whose length or address is not a multiple of 16 bytes.
__device__ __forceinline__ void copy_4(void* to_shared, const void* from, int valid = 4) {
    const unsigned to = unsigned(__cvta_generic_to_shared(to_shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `N` of this thread's groups are under way. A barrier must follow before other threads read what was copied.
template <int N>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- the end of row_sum: 32 lanes fold by 16, 8, 4, 2, 1 (NUMERICS.md, "row_sum"); every lane gets the sum ----------------

__device__ __forceinline__ float fold_lanes(float x) {
    for (int half = LANES / 2; half > 0; half /= 2) x = x + __shfl_down_sync(WARP, x, half);
    return __shfl_sync(WARP, x, 0);
}
// The exact maximum of 32 lanes, for every lane. A NaN loses to a number here, as in the CPU's: the sum brings it back.
__device__ __forceinline__ float max_of_lanes(float x) {
    for (int half = LANES / 2; half > 0; half /= 2) {
        const float other = __shfl_xor_sync(WARP, x, half);
        x = x < other ? other : x;
    }
    return x;
}

}  // namespace rk
