// norm.cu: layer_norm, rms_norm and normalize over the last dimension of [R, D].
// layer_norm: s = x + residual; mean and var by row_sum; y = fma((s - mean) * (1 / sqrt(var + eps)), w, b).
// rms_norm: the same with a mean of 0, and y = (s * (1 / sqrt(var + eps))) * w.
// normalize: y = x / max(sqrt(row_sum(x * x)), eps), each square rounded. Orders as NUMERICS.md has them.
//
// A warp or a block takes a row: x and residual are read once, s waits in shared memory as float32, where lane l of a warp
// reads s[l], s[l + 32], ... as row_sum wants it. A row that does not fit (D above some 25,000) is read again for every pass.

#include <type_traits>

#include "room.cuh"
#include "rows.cuh"

namespace rk {

struct NoResidual {};

// row = x + residual, in shared memory.
template <class T, class R, int WARPS, int N>
__device__ __forceinline__ void stage_sum(const T* x, const R* residual, int D, float* row) {
#pragma unroll 4
    for (int g = rank_in_team<WARPS>(); g < D / N; g += 32 * WARPS) {
        float v[N];
        load_group<N>(x + g * N, v);
        if constexpr (!std::is_same<R, NoResidual>::value) {
            float r[N];
            load_group<N>(residual + g * N, r);
#pragma unroll
            for (int j = 0; j < N; ++j) v[j] = v[j] + r[j];
        }
        put_group<N>(row, g, v);
    }
}

__device__ __forceinline__ float rstd_of(float sum_of_squares, float count, float eps) {
    return 1.0f / sqrt_of(sum_of_squares / count + eps);
}

// What layer_norm has not: one is added to the weight, and what the weight multiplies is rounded to x's dtype T first.
struct Rms {
    bool plus_one, rounded;
    __device__ __forceinline__ float weight(float w) const { return plus_one ? w + 1.0f : w; }
    template <class T>
    __device__ __forceinline__ float normed(float x) const {
        return rounded ? widen(narrow<T>(x)) : x;
    }
};

// RMS: no mean is taken off.
template <class T, int WARPS, int N, bool RMS>
__device__ __forceinline__ void norm_row(const NormArgs& a, Rms rms, int64_t at, float* row, float* slots) {
    const int D = int(a.D);
    const T* x = static_cast<const T*>(a.x.data) + at;
    if (!a.residual.given) stage_sum<T, NoResidual, WARPS, N>(x, nullptr, D, row);
    else if (a.residual.dtype == Dtype::F32)
        stage_sum<T, float, WARPS, N>(x, static_cast<const float*>(a.residual.data) + at, D, row);
    else if (a.residual.dtype == Dtype::F16)
        stage_sum<T, f16, WARPS, N>(x, static_cast<const f16*>(a.residual.data) + at, D, row);
    else stage_sum<T, bf16, WARPS, N>(x, static_cast<const bf16*>(a.residual.data) + at, D, row);
    team_barrier<WARPS>();
    const float count = float(a.D);
    const float mean = RMS ? 0.0f : team_row_sum<WARPS>(D, slots, [&](float sum, int64_t i) { return sum + row[i]; }) / count;
    const float squares = team_row_sum<WARPS>(D, slots + 1, [&](float sum, int64_t i) {
        const float c = row[i] - mean;
        return fmadd(c, c, sum);
    });
    const float rstd = rstd_of(squares, count, a.eps);
    T* y = static_cast<T*>(a.y) + at;
    constexpr int AT_ONCE = RMS ? 1 : 2;  // two groups of rms_norm, with its choices, are more than the registers hold
#pragma unroll AT_ONCE
    for (int g = rank_in_team<WARPS>(); g < D / N; g += 32 * WARPS) {
        float v[N], w[N];
        load_group_as<N>(a.weight, g * N, w);
        get_group<N>(row, g, v);
        if constexpr (RMS) {
#pragma unroll
            for (int j = 0; j < N; ++j) v[j] = rms.normed<T>(v[j] * rstd) * rms.weight(w[j]);
        } else if (a.bias.given) {
            float b[N];
            load_group_as<N>(a.bias, g * N, b);
#pragma unroll
            for (int j = 0; j < N; ++j) v[j] = fmadd((v[j] - mean) * rstd, w[j], b[j]);
        } else {
#pragma unroll
            for (int j = 0; j < N; ++j) v[j] = (v[j] - mean) * rstd * w[j];
        }
        store_group<N>(y + g * N, v);
    }
}

// `stride`: floats from one row to the next in shared memory. `vectors`: all addresses and D allow accesses of 16 bytes.
template <class T, int WARPS, bool RMS>
__device__ __forceinline__ void norm_rows(const NormArgs& a, Rms rms, int64_t rows, int stride, bool vectors) {
    extern __shared__ float4 memory[];
    float* const shared = reinterpret_cast<float*>(memory);
    const int team = WARPS == 1 ? int(threadIdx.x / 32) : 0, teams = WARPS == 1 ? int(blockDim.x / 32) : 1;
    const int64_t r = int64_t(blockIdx.x) * teams + team;
    if (r >= rows) return;
    float *row = shared + team * stride, *slots = shared + stride;
    if (vectors) norm_row<T, WARPS, VECTOR<T>, RMS>(a, rms, r * a.D, row, slots);
    else norm_row<T, WARPS, 1, RMS>(a, rms, r * a.D, row, slots);
}
template <class T, int WARPS>
__global__ void __launch_bounds__(32 * TEAM_WARPS) layer_norm_kernel(const NormArgs a, int64_t rows, int stride, bool vectors) {
    norm_rows<T, WARPS, false>(a, {}, rows, stride, vectors);
}
template <class T, int WARPS>
__global__ void __launch_bounds__(32 * TEAM_WARPS, 4)  // left alone, ptxas wants eight blocks on sm_90, and spills for them
    rms_norm_kernel(const NormArgs a, const Rms rms, int64_t rows, int stride, bool vectors) {
    norm_rows<T, WARPS, true>(a, rms, rows, stride, vectors);
}

// Any D: one block per row, whose first warp sums.
template <bool RMS>
__device__ __forceinline__ void norm_long(const NormArgs& a, Rms rms) {
    __shared__ float slots[2];
    const int64_t at = int64_t(blockIdx.x) * a.D;
    const auto s = [&](int64_t i) {
        const float x = load_as(a.x, at + i);
        return a.residual.given ? x + load_as(a.residual, at + i) : x;
    };
    const float count = float(a.D);
    const float mean =
        RMS ? 0.0f : team_row_sum<TEAM_WARPS>(a.D, slots, [&](float sum, int64_t i) { return sum + s(i); }) / count;
    const float squares = team_row_sum<TEAM_WARPS>(a.D, slots + 1, [&](float sum, int64_t i) {
        const float c = s(i) - mean;
        return fmadd(c, c, sum);
    });
    const float rstd = rstd_of(squares, count, a.eps);
    for (int64_t i = threadIdx.x; i < a.D; i += blockDim.x) {
        float normed = (s(i) - mean) * rstd, w = load_as(a.weight, i);
        if constexpr (RMS) {
            normed = a.x.dtype == Dtype::F16    ? rms.normed<f16>(normed)
                     : a.x.dtype == Dtype::BF16 ? rms.normed<bf16>(normed)
                                                : normed;
            w = rms.weight(w);
        }
        store_as(a.x.dtype, a.y, at + i, !RMS && a.bias.given ? fmadd(normed, w, load_as(a.bias, i)) : normed * w);
    }
}
__global__ void __launch_bounds__(32 * TEAM_WARPS) layer_norm_long_kernel(const NormArgs a) { norm_long<false>(a, {}); }
__global__ void __launch_bounds__(32 * TEAM_WARPS) rms_norm_long_kernel(const NormArgs a, const Rms rms) {
    norm_long<true>(a, rms);
}

// ---- normalize -----------------------------------------------------------------------------------------------------------

// The divisor of a row: its length, but not below eps; a NaN passes.
__device__ __forceinline__ float length_of(float sum_of_squares, float eps) { return at_least(eps, sqrt_of(sum_of_squares)); }

template <class T, int WARPS, int N>
__device__ __forceinline__ void normalize_row(const T* x, T* y, int D, float eps, float* row, float* slots) {
    stage_sum<T, NoResidual, WARPS, N>(x, nullptr, D, row);
    team_barrier<WARPS>();
    const float length =
        length_of(team_row_sum<WARPS>(D, slots, [&](float sum, int64_t i) { return sum + row[i] * row[i]; }), eps);
#pragma unroll 2
    for (int g = rank_in_team<WARPS>(); g < D / N; g += 32 * WARPS) {
        float v[N];
        get_group<N>(row, g, v);
#pragma unroll
        for (int j = 0; j < N; ++j) v[j] = v[j] / length;
        store_group<N>(y + g * N, v);
    }
}

// `stride` and `vectors` as in norm_rows.
template <class T, int WARPS>
__global__ void __launch_bounds__(32 * TEAM_WARPS)
    normalize_kernel(const T* x, T* y, int64_t rows, int64_t D, float eps, int stride, bool vectors) {
    extern __shared__ float4 memory[];
    float* const shared = reinterpret_cast<float*>(memory);
    const int team = WARPS == 1 ? int(threadIdx.x / 32) : 0, teams = WARPS == 1 ? int(blockDim.x / 32) : 1;
    const int64_t r = int64_t(blockIdx.x) * teams + team;
    if (r >= rows) return;
    float *row = shared + team * stride, *slots = shared + stride;
    if (vectors) normalize_row<T, WARPS, VECTOR<T>>(x + r * D, y + r * D, int(D), eps, row, slots);
    else normalize_row<T, WARPS, 1>(x + r * D, y + r * D, int(D), eps, row, slots);
}

// Any D: one block per row, whose first warp sums.
__global__ void __launch_bounds__(32 * TEAM_WARPS)
    normalize_long_kernel(const void* x, Dtype dtype, void* y, int64_t D, float eps) {
    __shared__ float slot;
    const int64_t at = int64_t(blockIdx.x) * D;
    const float squares = team_row_sum<TEAM_WARPS>(D, &slot, [&](float sum, int64_t i) {
        const float v = load_as(dtype, x, at + i);
        return sum + v * v;
    });
    const float length = length_of(squares, eps);
    for (int64_t i = threadIdx.x; i < D; i += blockDim.x) store_as(dtype, y, at + i, load_as(dtype, x, at + i) / length);
}

// ---- launchers -----------------------------------------------------------------------------------------------------------

static Choice layer_norm_choice("layer_norm", 2);
static Choice rms_norm_choice("rms_norm", 2);
static Choice normalize_choice("normalize", 2);

template <class F>
static void for_dtype(Dtype dtype, F start) {
    if (dtype == Dtype::F32) start(float());
    else if (dtype == Dtype::F16) start(f16());
    else start(bf16());
}

// kernel(a, more..., rows, stride, vectors)
template <class T, class Kernel, class... More>
static void start_rows(const Choice& choice, Kernel warp_a_row, Kernel block_a_row, const NormArgs& a, int64_t rows,
                       Stream stream, More... more) {
    const int way = choice.take(row_way(rows, a.D));
    const RowLaunch shape = row_launch(way, rows, a.D);
    const bool vectors = a.D % VECTOR<T> == 0 && aligned(a.x.data, 16) && aligned(a.residual.data, 16) &&
                         aligned(a.weight.data, 16) && aligned(a.bias.data, 16) && aligned(a.y, 16);
    launch(choice.kernel, way == BLOCK_A_ROW ? block_a_row : warp_a_row, checked_blocks(choice.kernel, shape.blocks),
           shape.threads, size_t(shape.shared), stream, a, more..., rows, int(row_stride(a.D)), vectors);
}

void layer_norm(const NormArgs& a, int64_t rows, Stream stream) {
    if (!row_fits(a.D))
        return launch("layer_norm", layer_norm_long_kernel, checked_blocks("layer_norm", rows), 32 * TEAM_WARPS, 0, stream, a);
    for_dtype(a.x.dtype, [&](auto t) {
        using T = decltype(t);
        start_rows<T>(layer_norm_choice, layer_norm_kernel<T, 1>, layer_norm_kernel<T, TEAM_WARPS>, a, rows, stream);
    });
}

void rms_norm(const NormArgs& a, bool plus_one, bool rounded, int64_t rows, Stream stream) {
    const Rms rms{plus_one, rounded};
    if (!row_fits(a.D))
        return launch("rms_norm", rms_norm_long_kernel, checked_blocks("rms_norm", rows), 32 * TEAM_WARPS, 0, stream, a, rms);
    for_dtype(a.x.dtype, [&](auto t) {
        using T = decltype(t);
        start_rows<T>(rms_norm_choice, rms_norm_kernel<T, 1>, rms_norm_kernel<T, TEAM_WARPS>, a, rows, stream, rms);
    });
}

template <class T>
static void normalize_of(const T* x, T* y, int64_t rows, int64_t D, float eps, Stream stream) {
    const int way = normalize_choice.take(row_way(rows, D));
    const RowLaunch shape = row_launch(way, rows, D);
    const bool vectors = D % VECTOR<T> == 0 && aligned(x, 16) && aligned(y, 16);
    launch("normalize", way == BLOCK_A_ROW ? normalize_kernel<T, TEAM_WARPS> : normalize_kernel<T, 1>,
           checked_blocks("normalize", shape.blocks), shape.threads, size_t(shape.shared), stream, x, y, rows, D, eps,
           int(row_stride(D)), vectors);
}

void normalize(const void* x, Dtype dtype, void* y, int64_t rows, int64_t D, float eps, Stream stream) {
    if (!row_fits(D))
        return launch("normalize", normalize_long_kernel, checked_blocks("normalize", rows), 32 * TEAM_WARPS, 0, stream, x,
                      dtype, y, D, eps);
    if (dtype == Dtype::F32) return normalize_of(static_cast<const float*>(x), static_cast<float*>(y), rows, D, eps, stream);
    if (dtype == Dtype::F16) return normalize_of(static_cast<const f16*>(x), static_cast<f16*>(y), rows, D, eps, stream);
    normalize_of(static_cast<const bf16*>(x), static_cast<bf16*>(y), rows, D, eps, stream);
}

}  // namespace rk
