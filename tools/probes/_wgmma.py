"""CUDA C++ for probes of Hopper's matrix instructions, made in Python, since an instruction of n columns names n / 2 registers.

`sums()`: one row of products after another by mma.sync, or by wgmma with an operand from shared memory or from registers.
`rates()`: the same instructions with nothing around them.
"""

from __future__ import annotations

COLUMNS = (8, 16, 24, 32, 64, 96, 128, 160, 192, 256)
HALVES = ("f16", "bf16")
RATED = {"f16": 16, "s8": 32, "tf32": 8}  # an instruction's operands, and how many k's it takes

# Operands lie in shared memory without a swizzle: 8 rows of 16 bytes are 128 bytes, the two of 16 k's stand side by side.
COMMON = """
typedef unsigned u32;
typedef unsigned long long u64;
typedef unsigned short u16;

__device__ __forceinline__ u64 operand(const void* shared) {
    return u64((u32(__cvta_generic_to_shared(shared)) & 0x3ffff) >> 4) | u64(128 / 16) << 16 | u64(256 / 16) << 32;
}
__device__ __forceinline__ void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end() {
    asm volatile("wgmma.commit_group.sync.aligned;\\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
}
"""

# 64 rows x N columns by each block; a [.., K], b [.., K], c and d [.., pitch], c may be null: then the sums begin at +0.
# way 0: both operands from shared memory; 1: a from registers; 2: as 0, but the first instruction begins by scale-d = 0.
SUMS = """
__device__ __forceinline__ void to_shared(u16* to, const u16* from, int rows, int K, int k) {
    for (int i = threadIdx.x; i < rows * 2; i += blockDim.x) {
        const int row = i / 2, core = i % 2;
        *reinterpret_cast<uint4*>(to + row / 8 * 128 + core * 64 + row % 8 * 8) =
            *reinterpret_cast<const uint4*>(from + size_t(row) * K + k + core * 8);
    }
}

template <class Step>
__device__ __forceinline__ void product(const u16* a, const u16* b, const float* c, float* d, int K, int pitch, int way) {
    constexpr int N = Step::N;
    __shared__ __align__(1024) u16 A[64 * 16];
    __shared__ __align__(1024) u16 B[N * 16];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const size_t m0 = size_t(blockIdx.y) * 64, n0 = size_t(blockIdx.x) * N;
    const size_t at = (m0 + warp * 16 + lane / 4) * pitch + n0 + lane % 4 * 2;
    a += m0 * K, b += n0 * K;
    float sum[N / 2];
    for (int j = 0; j < N / 8; ++j)
        for (int e = 0; e < 4; ++e) sum[4 * j + e] = c ? c[at + 8 * j + e % 2 + size_t(e / 2 * 8) * pitch] : 0.0f;
    // a zero that the compiler knows would become scale-d = 0
    for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(sum[i]));
    for (int k = 0; k < K; k += 16) {
        __syncthreads();
        to_shared(A, a, 64, K, k), to_shared(B, b, N, K, k);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads();
        const u16* row = a + size_t(warp * 16 + lane / 4) * K + k + lane % 4 * 2;
        u32 mine[4];
        for (int e = 0; e < 4; ++e) mine[e] = *reinterpret_cast<const u32*>(row + size_t(e % 2 * 8) * K + e / 2 * 8);
        begin();
        if (way == 1) Step::registers(sum, mine, operand(B));
        else Step::shared(sum, operand(A), operand(B), way == 2 && k == 0 ? 0 : 1);
        end();
    }
    for (int j = 0; j < N / 8; ++j)
        for (int e = 0; e < 4; ++e) d[at + 8 * j + e % 2 + size_t(e / 2 * 8) * pitch] = sum[4 * j + e];
}

// The same 64 rows x 8 columns by mma.sync.
template <class Step>
__device__ __forceinline__ void product_sync(const u16* a, const u16* b, const float* c, float* d, int K, int pitch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const size_t m0 = size_t(blockIdx.y) * 64 + warp * 16 + lane / 4, n0 = size_t(blockIdx.x) * 8;
    const size_t at = m0 * pitch + n0 + lane % 4 * 2;
    float sum[4];
    for (int e = 0; e < 4; ++e) sum[e] = c ? c[at + e % 2 + size_t(e / 2 * 8) * pitch] : 0.0f;
    for (int k = 0; k < K; k += 16) {
        const u16 *left = a + m0 * K + k + lane % 4 * 2, *right = b + (n0 + lane / 4) * K + k + lane % 4 * 2;
        u32 x[4], w[2];
        for (int e = 0; e < 4; ++e) x[e] = *reinterpret_cast<const u32*>(left + size_t(e % 2 * 8) * K + e / 2 * 8);
        for (int e = 0; e < 2; ++e) w[e] = *reinterpret_cast<const u32*>(right + e * 8);
        Step::multiply(sum, x, w);
    }
    for (int e = 0; e < 4; ++e) d[at + e % 2 + size_t(e / 2 * 8) * pitch] = sum[e];
}
"""


def names(first: int, count: int) -> str:
    return "{" + ", ".join(f"%{i}" for i in range(first, first + count)) + "}"


def written(array: str, count: int, constraint: str) -> str:
    return ", ".join(f'"{constraint}"({array}[{i}])' for i in range(count))


def wgmma(n: int, half: str) -> str:
    """struct <half>_<n>: sum[n / 2] += a b, a from shared memory or from registers."""
    r = n // 2
    instruction = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{half}.{half} {names(0, r)}"
    sums = written("d", r, "+f")
    return f"""
struct {half}_{n} {{
    static constexpr int N = {n};
    static __device__ __forceinline__ void shared(float (&d)[{r}], u64 a, u64 b, int add) {{
        asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{r + 2}, 0;\\n{instruction}, %{r}, %{r + 1}, p, 1, 1, 0, 0;\\n}}"
                     : {sums} : "l"(a), "l"(b), "r"(add));
    }}
    static __device__ __forceinline__ void registers(float (&d)[{r}], const u32 (&a)[4], u64 b) {{
        asm volatile("{instruction}, {names(r, 4)}, %{r + 4}, 1, 1, 1, 0;"
                     : {sums} : {written("a", 4, "r")}, "l"(b));
    }}
}};
extern "C" __global__ void __launch_bounds__(128)
    sums_{half}_{n}(const u16* a, const u16* b, const float* c, float* d, int K, int pitch, int way) {{
    product<{half}_{n}>(a, b, c, d, K, pitch, way);
}}"""


def mma(half: str) -> str:
    instruction = f"mma.sync.aligned.m16n8k16.row.col.f32.{half}.{half}.f32"
    return f"""
struct {half}_sync {{
    static __device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {{
        asm volatile("{instruction} {names(0, 4)}, {names(4, 4)}, {names(8, 2)}, {names(0, 4)};"
                     : {written("d", 4, "+f")} : {written("a", 4, "r")}, {written("b", 2, "r")});
    }}
}};
extern "C" __global__ void __launch_bounds__(128)
    sums_{half}_sync(const u16* a, const u16* b, const float* c, float* d, int K, int pitch, int) {{
    product_sync<{half}_sync>(a, b, c, d, K, pitch);
}}"""


def sums(columns: tuple[int, ...] = COLUMNS) -> str:
    return "\n".join([COMMON, SUMS, *(mma(h) for h in HALVES), *(wgmma(n, h) for h in HALVES for n in columns)])


def rate(kind: str) -> str:
    """m64n256 from shared memory, `count` times four of them; what is added up matters to nobody."""
    sum_kind, k, add = ("s32", RATED[kind], "p") if kind == "s8" else ("f32", RATED[kind], "p, 1, 1")
    add += ", 0, 0" if kind == "f16" else ""
    instruction = f"wgmma.mma_async.sync.aligned.m64n256k{k}.{sum_kind}.{kind}.{kind} {names(0, 128)}"
    kept, constraint = ("int", "+r") if kind == "s8" else ("float", "+f")
    return f"""
extern "C" __global__ void __launch_bounds__(256, 1) rate_{kind}(void* out, int count) {{
    __shared__ __align__(1024) u16 A[2][64 * 16];
    __shared__ __align__(1024) u16 B[256 * 16];
    // bits that switch, as a model's do: on zeros the clock would be higher
    for (int i = threadIdx.x; i < 64 * 16; i += blockDim.x) A[0][i] = A[1][i] = u16(i * 40503u >> 3 & 0x3bff);
    for (int i = threadIdx.x; i < 256 * 16; i += blockDim.x) B[i] = u16(i * 30011u >> 2 & 0x3bff);
    {kept} d[128];
    for (int i = 0; i < 128; ++i) d[i] = 0;
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    const u64 a = operand(A[threadIdx.x / 128]), b = operand(B);
    for (int i = 0; i < count; ++i) {{
        begin();
#pragma unroll
        for (int step = 0; step < 4; ++step)
            asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %130, 0;\\n{instruction}, %128, %129, {add};\\n}}"
                         : {written("d", 128, constraint)} : "l"(a), "l"(b), "r"(1));
        end();
    }}
    for (int i = 0; i < 128; ++i)
        if (d[i] != 0) reinterpret_cast<{kept}*>(out)[threadIdx.x] = d[i];
}}"""


def rates() -> str:
    return "\n".join([COMMON, *(rate(kind) for kind in RATED)])
