// epilogue.cuh: what a sum goes through on its way out: y[m, n] = act(sum + bias[n]) + residual[m, n], for linear and bmm of
// both modes.
//
// Order: bias, activation, residual, each one float32 step, and one rounding at the store. A thread takes 4 or 8 neighbours, so
// that it stores up to 16 bytes at once.
#pragma once

#include "device.cuh"

namespace rk {

template <class F>
__device__ __forceinline__ Four each(Four x, F f) {
    for (int e = 0; e < 4; ++e) x.v[e] = f(x.v[e]);
    return x;
}
// How far an activation goes: to all digits of float32, or in mode tensor to what the result can hold.
enum class Digits { OF_FLOAT, OF_RESULT };
// One switch for four elements; `half`: they are rounded to half precision in the end.
template <Digits DIGITS = Digits::OF_FLOAT>
__device__ __forceinline__ Four activate_four(int kind, Four x, bool half = false) {
    if (DIGITS == Digits::OF_RESULT && half && kind == GELU) return each(x, gelu_short);
    switch (kind) {
        case GELU: return each(x, gelu_of<float>);
        case GELU_TANH: return each(x, gelu_tanh_of<float>);
        case TANH: return each(x, tanh_of<float>);
        case RELU: return each(x, relu_of<float>);
        case SILU: return each(x, silu_of<float>);
        case SIGMOID: return each(x, sigmoid_of<float>);
        case QUICK_GELU: return each(x, quick_gelu_of<float>);
        case RELU2: return each(x, relu2_of<float>);
        case LEAKY_RELU: return each(x, leaky_relu_of<float>);
        case MISH: return each(x, mish_of<float>);
        default: return x;
    }
}

// 4 or 8 neighbours; the address is a multiple of their size, or of 16.
__device__ __forceinline__ void load_group_as(Dtype dtype, const void* p, int64_t i, Four (&v)[1]) {
    v[0] = load_four_as(dtype, p, i);
}
__device__ __forceinline__ void load_group_as(Dtype dtype, const void* p, int64_t i, Four (&v)[2]) {
    if (dtype == Dtype::F32) {
        v[0] = load_four_as(dtype, p, i);
        v[1] = load_four_as(dtype, p, i + 4);
        return;
    }
    const uint4 raw = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p) + i);
    const unsigned pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        const uint16_t bits = uint16_t(pairs[e / 2] >> (e % 2 * 16));
        v[e / 4].v[e % 4] = dtype == Dtype::F16 ? widen(f16{bits}) : widen(bf16{bits});
    }
}
__device__ __forceinline__ void store_group_as(Dtype dtype, void* p, int64_t i, const Four (&v)[1]) {
    store_four_as(dtype, p, i, v[0]);
}
__device__ __forceinline__ void store_group_as(Dtype dtype, void* p, int64_t i, const Four (&v)[2]) {
    if (dtype == Dtype::F32) {
        store_four_as(dtype, p, i, v[0]);
        store_four_as(dtype, p, i + 4, v[1]);
        return;
    }
    unsigned pairs[4] = {};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        const float x = v[e / 4].v[e % 4];
        const unsigned bits = dtype == Dtype::F16 ? narrow<f16>(x).bits : narrow<bf16>(x).bits;
        pairs[e / 2] |= bits << (e % 2 * 16);
    }
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p) + i) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// Whether outputs can be handled `count` at a time: N and every address in the epilogue allow it.
inline bool in_groups_of(int count, const LinearArgs& g) {
    const auto fits = [&](const auto& array) {
        const int64_t bytes = count * bytes_of(array.dtype);
        return aligned(array.data, unsigned(bytes < 16 ? bytes : 16));  // so are the null ones of what is absent
    };
    return g.N % count == 0 && fits(g.bias) && fits(g.residual) && fits(g.out);
}

// The epilogue of outputs [m, n .. n + 4 Q - 1], `whole` if in_groups_of(4 Q); those past N are left alone.
template <Digits DIGITS = Digits::OF_FLOAT, int Q>
__device__ __forceinline__ void finish(const LinearArgs& g, bool whole, int64_t m, int64_t n, Four (&y)[Q]) {
    const int64_t at = m * g.N + n;
    const int some = g.N - n < 4 * Q ? int(g.N - n) : 4 * Q;
    const auto load = [&](const Ref& from, int64_t i, Four(&v)[Q]) {
        if (whole) return load_group_as(from.dtype, from.data, i, v);
#pragma unroll
        for (int e = 0; e < 4 * Q; ++e)
            if (e < some) v[e / 4].v[e % 4] = load_as(from, i + e);
    };
    if (DIGITS == Digits::OF_RESULT) {  // a sum that underflowed to -0, which an mma of zeros makes +0
#pragma unroll
        for (int e = 0; e < 4 * Q; ++e) y[e / 4].v[e % 4] = y[e / 4].v[e % 4] + 0.0f;
    }
    if (g.bias.given) {
        Four b[Q] = {};
        load(g.bias, n, b);
#pragma unroll
        for (int e = 0; e < 4 * Q; ++e) y[e / 4].v[e % 4] = y[e / 4].v[e % 4] + b[e / 4].v[e % 4];
    }
#pragma unroll
    for (int q = 0; q < Q; ++q) y[q] = activate_four<DIGITS>(g.activation, y[q], g.out.dtype != Dtype::F32);
    if (g.residual.given) {
        Four r[Q] = {};
        load(g.residual, at, r);
#pragma unroll
        for (int e = 0; e < 4 * Q; ++e) y[e / 4].v[e % 4] = y[e / 4].v[e % 4] + r[e / 4].v[e % 4];
    }
    if (whole) return store_group_as(g.out.dtype, g.out.data, at, y);
#pragma unroll
    for (int e = 0; e < 4 * Q; ++e)
        if (e < some) store_as(g.out, at + e, y[e / 4].v[e % 4]);
}

}  // namespace rk
