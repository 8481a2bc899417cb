// rotary.cu: rotary position embedding of [tokens, H, D]: y_a = x_a * cos - x_b * sin; y_b = x_b * cos + x_a * sin; two rounded
// products and their sum (NUMERICS.md, "rotary").
//
// A block takes one token. Its threads go over groups of N neighbours: of the pairs of all heads, then of the features behind
// the pairs. Nothing is read twice but cos and sin, which the heads of a token share through the L1 cache.

#include "room.cuh"
#include "rows.cuh"

namespace rk {

constexpr int ROTARY_THREADS = 256;

// The first 2 P features of every head of a token. Halves: N pairs are N neighbours of each half. Interleaved: they are 2 N
// neighbours, two groups.
template <class T, int N, bool INTERLEAVED>
__device__ __forceinline__ void turn_token(const RotaryArgs& a, const T* x, T* y, int64_t token) {
    const int groups = int(a.P) / N;
    for (int i = threadIdx.x; i < int(a.H) * groups; i += blockDim.x) {
        const int head = i / groups, p = i % groups * N;
        const T* from = x + head * a.x_head;
        T* to = y + head * a.D;
        float c[N], s[N], u[N], v[N];
        load_group_as<N>(a.cos, token * a.P + p, c);
        load_group_as<N>(a.sin, token * a.P + p, s);
        const int64_t at = INTERLEAVED ? 2 * p : p, then = INTERLEAVED ? 2 * p + N : p + a.P;
        load_group<N>(from + at, u);
        load_group<N>(from + then, v);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            float *first = u + j, *second = v + j;
            if constexpr (INTERLEAVED && N > 1) {  // u and v hold pairs: (u0, u1), (u2, u3), ... (v0, v1), ...
                first = (j < N / 2 ? u : v) + 2 * j % N;
                second = first + 1;
            }
            const float x_a = *first, x_b = *second;
            *first = x_a * c[j] - x_b * s[j];
            *second = x_b * c[j] + x_a * s[j];
        }
        store_group<N>(to + at, u);
        store_group<N>(to + then, v);
    }
}

// `vectors`: addresses, strides, P and D allow accesses of 16 bytes. Four blocks at once, for ptxas would otherwise make room
// for six on sm_86 and sm_89, and spill.
template <class T>
__global__ void __launch_bounds__(ROTARY_THREADS, 4) rotary_kernel(const RotaryArgs a, bool vectors) {
    const int64_t token = blockIdx.x;
    const T* x = static_cast<const T*>(a.x.data) + token * a.x_token;
    T* y = static_cast<T*>(a.y) + token * a.H * a.D;
    if (vectors && a.interleaved) turn_token<T, VECTOR<T>, true>(a, x, y, token);
    else if (vectors) turn_token<T, VECTOR<T>, false>(a, x, y, token);
    else if (a.interleaved) turn_token<T, 1, true>(a, x, y, token);
    else turn_token<T, 1, false>(a, x, y, token);
    const int behind = int(a.D - 2 * a.P);
    for (int i = threadIdx.x; i < int(a.H) * behind; i += blockDim.x) {
        const int head = i / behind;
        const int64_t at = 2 * a.P + i % behind;
        y[head * a.D + at] = x[head * a.x_head + at];
    }
}

template <class T>
static void rotary_of(const RotaryArgs& a, int64_t tokens, Stream stream) {
    constexpr int64_t N = VECTOR<T>;
    const bool strides = a.x_token % N == 0 && a.x_head % N == 0 && a.D % N == 0 && a.P % 8 == 0;
    const bool vectors =
        strides && aligned(a.x.data, 16) && aligned(a.y, 16) && aligned(a.cos.data, 16) && aligned(a.sin.data, 16);
    launch("rotary", rotary_kernel<T>, checked_blocks("rotary", tokens), ROTARY_THREADS, 0, stream, a, vectors);
}

void rotary(const RotaryArgs& args, int64_t tokens, Stream stream) {
    if (args.H * args.D == 0) return;
    if (args.x.dtype == Dtype::F32) return rotary_of<float>(args, tokens, stream);
    if (args.x.dtype == Dtype::F16) return rotary_of<f16>(args, tokens, stream);
    rotary_of<bf16>(args, tokens, stream);
}

}  // namespace rk
