// lanes.h: one function over 32 lanes. Written so that g++ -O3 turns each loop into a few vector instructions.
#pragma once

#include "machine.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace ptxsim {

// How a PTX type lies in its cell: 8 and 16 bits zero-extended to 32, the others as they are.
template <class T>
struct CellOf {
    using type = T;
};
template <>
struct CellOf<u8> {
    using type = u32;
};
template <>
struct CellOf<s8> {
    using type = u32;
};
template <>
struct CellOf<u16> {
    using type = u32;
};
template <>
struct CellOf<s16> {
    using type = u32;
};
template <class T>
using Cell = typename CellOf<T>::type;
template <class T>
inline T get(Cell<T> c) {
    return T(c);
}
template <class T>
inline Cell<T> put(T v) {
    if constexpr (sizeof(T) == 2) return u16(v);
    else if constexpr (sizeof(T) == 1) return u8(v);
    else return v;
}

// d[i] = f(s[i]...) for the lanes that run. A destination may be one of the sources, never a shifted one.
template <class D, class F, class... S>
inline __attribute__((always_inline)) void map_cells(u32 mask, D* d, F f, const S*... s) {
    if (__builtin_expect(mask == FULL, 1)) {
#pragma GCC ivdep
        for (int i = 0; i < 32; i++) d[i] = f(s[i]...);
    } else {
#pragma GCC ivdep
        for (int i = 0; i < 32; i++) {
            const D v = f(s[i]...);
            d[i] = mask >> i & 1 ? v : d[i];
        }
    }
}

// The typed form: D and S are PTX types, f gets and gives values of these types.
template <class D, class A, class F>
inline __attribute__((always_inline)) void map1(Warp& w, const Inst& in, F f) {
    map_cells(w.mask, w.at<Cell<D>>(in.x[0]), [=](Cell<A> a) { return put<D>(f(get<A>(a))); }, w.at<Cell<A>>(in.x[1]));
}
template <class D, class A, class B, class F>
inline __attribute__((always_inline)) void map2(Warp& w, const Inst& in, F f) {
    map_cells(
        w.mask, w.at<Cell<D>>(in.x[0]), [=](Cell<A> a, Cell<B> b) { return put<D>(f(get<A>(a), get<B>(b))); },
        w.at<Cell<A>>(in.x[1]), w.at<Cell<B>>(in.x[2]));
}
template <class D, class A, class B, class C, class F>
inline __attribute__((always_inline)) void map3(Warp& w, const Inst& in, F f) {
    map_cells(
        w.mask, w.at<Cell<D>>(in.x[0]),
        [=](Cell<A> a, Cell<B> b, Cell<C> c) { return put<D>(f(get<A>(a), get<B>(b), get<C>(c))); }, w.at<Cell<A>>(in.x[1]),
        w.at<Cell<B>>(in.x[2]), w.at<Cell<C>>(in.x[3]));
}

// 32 cells of 0 or ~0 to a bit a lane.
inline u32 pack(const u32* t) {
#ifdef __AVX2__
    u32 bits = 0;
    for (int i = 0; i < 4; i++)
        bits |= u32(_mm256_movemask_ps(_mm256_loadu_ps(reinterpret_cast<const float*>(t + 8 * i)))) << 8 * i;
    return bits;
#else
    u32 bits = 0;
    for (int i = 0; i < 32; i++) bits |= (t[i] & 1) << i;
    return bits;
#endif
}
template <class F, class... S>
inline __attribute__((always_inline)) u32 test_cells(F f, const S*... s) {
    alignas(64) u32 t[32];
#pragma GCC ivdep
    for (int i = 0; i < 32; i++) t[i] = f(s[i]...) ? FULL : 0;
    return pack(t);
}

// One lane after another, for what does not vectorise.
template <class F>
inline void each_lane(u32 mask, F f) {
    for (u32 m = mask; m; m &= m - 1) f(u32(__builtin_ctz(m)));
}

}  // namespace ptxsim
