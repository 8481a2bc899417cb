// lt.cpp: a stand-in for libcublasLt.so on the CPU, of which a test says how it behaves (`standin_behave`). What it is asked
// for is what rerank_kernels/backend/native/cublaslt.py asks: D = A^T B (+ bias, or + C) of half precision in columns.
//
// Its sums are an H100's: 16 products and the sum so far, aligned to the largest exponent, cut off 25 bits below it. It is
// written from NUMERICS.md and shares no line with the simulator's mma.sync, whose sums it is compared with; only roundings are
// shared.
#include <atomic>
#include <cmath>
#include <cstring>

#include "../ptxsim/machine/rounding.h"

using namespace ptxsim;

enum Behaviour {
    EQUAL,         // one algorithm, whose sums are an H100's
    ZEROS,         // and another sign where a sum is zero
    LAST_ROW,      // and one bit off in the last row, from 40 rows on
    SPLITS,        // all of its algorithms split K, though the sums are an H100's this time
    FIRST_SPLITS,  // the first does, the second does not
    WORKSPACE,     // they want a workspace
    SHORT_SUMS,    // they say that their sums are float16
    FAILS,         // none runs
    FAILS_LATER,   // nor, from the seventh call on, the one that did
    CLOSED,        // it cannot be opened
    KEEPS_SIGN,    // a sum that underflows keeps its sign: a plain sum, without the + 0 of NUMERICS.md's linear
};

struct Desc {
    int transposed = 0;
    unsigned epilogue = 1;
    const void* bias = nullptr;
};
struct Layout {
    int type;
    u64 rows, columns;
    s64 pitch;
};
struct Preference {
    u64 workspace = 32 << 20;
    unsigned reduction = ~0u, alignment = 256;
};
struct Algorithm {
    u64 splitk, reduction, id, nothing[5];
};
struct Heuristic {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

static int behaviour = EQUAL;
static size_t version = 130100;
static std::atomic<int> calls{0}, opened{0};

static float wide(u16 h, int type) { return type == 2 ? from_half(h) : from_bf16(h); }

static int exponent(float x, int least) { return std::max(std::ilogb(x), least); }

// c and 16 products at most
static float step(float c, const float* a, const float* b, int count, int least) {
    double plain = c;
    bool finite = std::isfinite(c);
    int top = c != 0 ? exponent(c, -126) : -5000;
    for (int i = 0; i < count; i++) {
        plain += double(a[i]) * b[i];
        finite &= std::isfinite(a[i]) && std::isfinite(b[i]);
        if (a[i] != 0 && b[i] != 0) top = std::max(top, exponent(a[i], least) + exponent(b[i], least));
    }
    if (!finite) return float(plain);
    if (top == -5000) return 0.0f;
    double sum = std::trunc(std::ldexp(double(c), 25 - top));
    for (int i = 0; i < count; i++) sum += std::trunc(std::ldexp(double(a[i]) * b[i], 25 - top));
    return float_directed(std::ldexp(sum, top - 25), RZ);
}

extern "C" {
void standin_behave(int how, size_t as_version) { behaviour = how, version = as_version, calls = 0; }
int standin_calls() { return calls; }
int standin_opened() { return opened; }

size_t cublasLtGetVersion() { return version; }
int cublasLtCreate(void** handle) {
    if (behaviour == CLOSED) return 3;
    return *handle = new int, ++opened, 0;
}

int cublasLtMatmulDescCreate(Desc** desc, int compute, int scale) {
    if (compute != 68 || scale != 0) return 7;
    return *desc = new Desc, 0;
}
int cublasLtMatmulDescDestroy(Desc* desc) { return delete desc, 0; }
int cublasLtMatmulDescSetAttribute(Desc* desc, int attribute, const void* value, size_t size) {
    if (attribute == 3 && size == 4) std::memcpy(&desc->transposed, value, 4);
    else if (attribute == 7 && size == 4) std::memcpy(&desc->epilogue, value, 4);
    else if (attribute == 8 && size == 8) std::memcpy(&desc->bias, value, 8);
    else return 7;
    return 0;
}
int cublasLtMatrixLayoutCreate(Layout** layout, int type, u64 rows, u64 columns, s64 pitch) {
    return *layout = new Layout{type, rows, columns, pitch}, 0;
}
int cublasLtMatrixLayoutDestroy(Layout* layout) { return delete layout, 0; }
int cublasLtMatrixLayoutSetAttribute(Layout* layout, int attribute, const void* value, size_t size) {
    if (attribute != 3 || size != 8) return 7;
    std::memcpy(&layout->columns, value, 8);
    return 0;
}
int cublasLtMatmulPreferenceCreate(Preference** p) { return *p = new Preference, 0; }
int cublasLtMatmulPreferenceDestroy(Preference* p) { return delete p, 0; }
int cublasLtMatmulPreferenceSetAttribute(Preference* p, int attribute, const void* value, size_t size) {
    if (attribute == 1 && size == 8) std::memcpy(&p->workspace, value, 8);
    else if (attribute == 3 && size == 4) std::memcpy(&p->reduction, value, 4);
    else if (attribute >= 5 && attribute <= 8 && size == 4) std::memcpy(&p->alignment, value, 4);
    else return 7;
    return 0;
}
int cublasLtMatmulAlgoGetHeuristic(void*, Desc* desc, Layout* a, Layout* b, Layout* c, Layout* d, Preference* p, int most,
                                   Heuristic* found, int* count) {
    // what it would do with a workspace, or with addresses that are multiples of 256, is not what it is to be asked for
    if (!desc->transposed || p->workspace != 0 || p->reduction != 0 || p->alignment != 16 || most < 2) return 7;
    if (a->rows != b->rows || d->rows != a->columns || d->columns != b->columns || c != d) return 7;
    *count = 2;
    for (int i = 0; i < 2; i++) {
        const bool splits = behaviour == SPLITS || (behaviour == FIRST_SPLITS && i == 0);
        found[i] = Heuristic{};
        found[i].algorithm.splitk = splits ? 4 : 1;
        found[i].algorithm.id = i;
        found[i].workspace = behaviour == WORKSPACE ? 1 << 20 : 0;
    }
    return 0;
}
int cublasLtMatmulAlgoConfigGetAttribute(const Algorithm* algorithm, int attribute, void* value, size_t size, size_t* written) {
    const bool narrow = attribute == 8;  // the cluster: 16 bits
    if (size != (narrow ? 2 : 4)) return 7;
    const u64 held = attribute == 2 ? algorithm->splitk : attribute == 3 ? algorithm->reduction : algorithm->id;
    *written = size;
    std::memcpy(value, &held, size);
    return 0;
}
int cublasLtMatmulAlgoCapGetAttribute(const Algorithm*, int attribute, void* value, size_t size, size_t* written) {
    if (attribute != 15 || size != 8) return 7;
    const u64 flags = behaviour == SHORT_SUMS ? 0x10102 : 0x10202;
    *written = size;
    std::memcpy(value, &flags, 8);
    return 0;
}
int cublasLtMatmul(void*, Desc* desc, const float* alpha, const u16* A, Layout* a, const u16* B, Layout* b, const float* beta,
                   const u16* C, Layout*, u16* D, Layout* d, const Algorithm*, void* workspace, size_t bytes, void*) {
    const int now = ++calls;
    if (behaviour == FAILS || (behaviour == FAILS_LATER && now >= 7)) return 13;
    if (*alpha != 1.0f || workspace != nullptr || bytes != 0 || d->columns != b->columns || d->rows != a->columns) return 7;
    const int K = int(a->rows), type = a->type, least = type == 2 ? -14 : -126;
    for (u64 m = 0; m < b->columns; m++)
        for (u64 n = 0; n < a->columns; n++) {
            float sum = 0.0f;
            for (int k = 0; k < K; k += 16) {
                float left[16], right[16];
                const int count = std::min(16, K - k);
                for (int i = 0; i < count; i++) {
                    left[i] = wide(A[n * a->pitch + k + i], type);
                    right[i] = wide(B[m * b->pitch + k + i], type);
                }
                sum = step(sum, left, right, count, least);
            }
            if (behaviour != KEEPS_SIGN) sum += 0.0f;
            if (behaviour == ZEROS && sum == 0) sum = -0.0f;
            if (desc->epilogue == 4) sum += wide(static_cast<const u16*>(desc->bias)[n], type);
            if (*beta != 0) sum += *beta * wide(C[m * d->pitch + n], type);
            u16 stored = u16(type == 2 ? to_half(sum) : to_bf16(sum));
            if (behaviour == LAST_ROW && b->columns >= 40 && m + 1 == b->columns) stored ^= 1;
            D[m * d->pitch + n] = stored;
        }
    return 0;
}
}
