// matrix.cpp: ldmatrix, stmatrix and mma.sync.
//
// How a tensor core adds up is not specified, and differs between GPUs. A kernel that depends on it must be right under every
// order, so there are four (option mma): 0 one fma after another, 1 the exact sum rounded once, 2 products aligned to the
// largest exponent and cut off, which for half precision is what an H100 does, 3 the fma in reverse.
#include "matrix.h"

#include <algorithm>
#include <cmath>

#include "lanes.h"
#include "rounding.h"

namespace ptxsim {

// ---- sums

struct Exact {  // a sum of doubles without an error, as numbers that do not overlap
    double part[80];
    int count = 0;
    void add(double x) {
        int kept = 0;
        for (int i = 0; i < count; i++) {
            double y = part[i];
            if (std::fabs(x) < std::fabs(y)) std::swap(x, y);
            const double hi = x + y, lo = y - (hi - x);
            if (lo != 0) part[kept++] = lo;
            x = hi;
        }
        part[kept++] = x;
        count = kept;
    }
    double odd() const {  // rounded to odd: the next rounding is then the only one
        double s = count ? part[count - 1] : 0, rest = 0;
        for (int i = count - 2; i >= 0 && rest == 0; i--) rest = part[i];
        u64 u = bits_of(s);
        if (rest != 0 && !(u & 1)) u = (rest > 0) == (s > 0) ? u | 1 : u - 1;
        return as_double(u);
    }
};

// Mode 2. Products and the sum so far are aligned to the largest exponent, a product's being the sum of its operands', cut off
// 25 bits below it, added without loss, and cut off to float32. That is what an H100 gave, 16 products at a time, in 24,576 of
// 24,576 sums (tests/backend/test_gpu_tensor.py, test_what_an_mma_gives; no operand was zero).
static float truncated(const double* p, const int* exponent, int n) {
    int top = -5000;
    bool finite = true;
    for (int i = 0; i < n; i++) {
        finite &= (bits_of(p[i]) >> 52 & 0x7ff) != 0x7ff;
        top = std::max(top, p[i] != 0 ? exponent[i] : -5000);
    }
    if (!finite) {
        double sum = 0;
        for (int i = 0; i < n; i++) sum += p[i];
        return float(sum);
    }
    if (top == -5000) return 0.0f;
    // Powers of two: no product loses a bit but those that are cut off, and no sum does. A product is below 2^(top + 2).
    const double one = as_double(u64(1023 + 25 - top) << 52), unit = as_double(u64(1023 + top - 25) << 52);
    s64 sum = 0;
    for (int i = 0; i < n; i++) sum += s32(p[i] * one);
    const double whole = double(sum) * unit, size = std::fabs(whole);
    if (size < 0x1p-126 || size >= 0x1p128) return float_directed(whole, RZ);
    return float(as_double(bits_of(whole) >> 29 << 29));
}

// `least`: of its format, which subnormal numbers have too, and zeros. What is not finite needs none.
static int exponent_of(float x, int least) { return std::max(int(bits_of(x) >> 23 & 255) - 127, least); }

float accumulate(int mode, float c, const float* a, const float* b, int n, int step, int least) {
    if (mode == 0) {
        for (int i = 0; i < n; i++) c = __builtin_fmaf(a[i], b[i], c);
    } else if (mode == 3) {
        for (int i = n - 1; i >= 0; i--) c = __builtin_fmaf(a[i], b[i], c);
    } else if (mode == 1) {
        double plain = c;
        for (int i = 0; i < n; i++) plain += double(a[i]) * b[i];
        if (!std::isfinite(plain)) return canonical(float(plain));
        Exact s;
        s.add(c);
        for (int i = 0; i < n; i++) s.add(double(a[i]) * b[i]);
        c = float(s.odd());
    } else {
        double p[65];
        int exponent[65];
        for (int k = 0; k < n; k += step) {
            int m = 1;
            p[0] = c, exponent[0] = exponent_of(c, -126);
            for (int i = k; i < std::min(n, k + step); i++, m++) {
                p[m] = double(a[i]) * b[i];
                exponent[m] = exponent_of(a[i], least) + exponent_of(b[i], least);
            }
            c = truncated(p, exponent, m);
        }
    }
    return canonical(c);
}

// ---- mma.sync: fragments as the PTX ISA lays them out: g = lane / 4, t = lane % 4

enum Kind { K_F16, K_BF16, K_TF32, K_S8, K_U8, K_E4M3, K_E5M2, K_F64, K_S4, K_U4, K_B1 };

static int per_register(int kind) { return kind == K_TF32 ? 1 : kind <= K_BF16 ? 2 : 4; }
static float e4m3(u32 v) {
    const int e = v >> 3 & 15, m = v & 7;
    const float r = e == 15 && m == 7 ? NAN : e ? std::ldexp(1 + m / 8.0f, e - 7) : std::ldexp(m / 8.0f, -6);
    return v & 128 ? -r : r;
}
static float element(u32 reg, int e, int kind) {
    switch (kind) {
        case K_F16: return from_half(reg >> 16 * e & 0xffff);
        case K_BF16: return from_bf16(reg >> 16 * e);
        case K_TF32: return as_float(reg & 0xffffe000u);
        case K_S8: return float(s8(reg >> 8 * e));
        case K_U8: return float(u8(reg >> 8 * e));
        case K_E4M3: return e4m3(reg >> 8 * e & 255);
        default: return from_half((reg >> 8 * e & 255) << 8);
    }
}

// imm: m | n << 8 | k << 16 | kind of a << 24 | kind of b << 28 | f16 accumulators << 32 | saturate << 33
// the pool: registers of d, a, b, c
static void mma(Warp& w, const Inst& in) {
    if (w.mask != FULL) fault(w, u32(__builtin_ctz(w.mask)), in, "mma without all 32 lanes of the warp");
    const int M = int(in.imm & 255), K = int(in.imm >> 16 & 255), ka = int(in.imm >> 24 & 15), kb = int(in.imm >> 28 & 15);
    const bool half = in.imm >> 32 & 1;
    const int each = per_register(ka), chunks = K / (4 * each), rows = M / 8, nc = half ? rows : 2 * rows;
    const s32* reg = &w.program->pool[size_t(in.more)];
    const s32 *d = reg, *a = d + nc, *b = a + chunks * rows, *c = b + chunks;
    float A[16][64], B[8][64];
    for (int lane = 0; lane < 32; lane++) {
        const int g = lane / 4, t = lane % 4;
        for (int q = 0; q < chunks; q++)
            for (int e = 0; e < each; e++) {
                const int k = (q * 4 + t) * each + e;
                for (int h = 0; h < rows; h++) A[g + 8 * h][k] = element(w.at<u32>(a[q * rows + h])[lane], e, ka);
                B[g][k] = element(w.at<u32>(b[q])[lane], e, kb);
            }
    }
    const bool integer = ka == K_S8 || ka == K_U8;
    const int mode = w.launch->options.mma, step = each == 2 ? 16 : 4 * each, least = ka == K_F16 ? -14 : -126;
    u32 out[32][4] = {};
    for (int lane = 0; lane < 32; lane++) {
        const int g = lane / 4, t = lane % 4;
        for (int h = 0; h < rows; h++)
            for (int j = 0; j < 2; j++) {
                const float *x = A[g + 8 * h], *y = B[2 * t + j];
                if (integer) {
                    s64 s = s32(w.at<u32>(c[2 * h + j])[lane]);
                    for (int k = 0; k < K; k++) s += s64(x[k]) * s64(y[k]);
                    if (in.imm >> 33 & 1) s = std::min<s64>(std::max<s64>(s, INT32_MIN), INT32_MAX);
                    out[lane][2 * h + j] = u32(s);
                } else if (half) {
                    const float from = from_half(w.at<u32>(c[h])[lane] >> 16 * j & 0xffff);
                    out[lane][h] |= to_half(accumulate(mode, from, x, y, K, step, least)) << 16 * j;
                } else {
                    out[lane][2 * h + j] =
                        bits_of(accumulate(mode, as_float(w.at<u32>(c[2 * h + j])[lane]), x, y, K, step, least));
                }
            }
    }
    for (int r = 0; r < nc; r++)
        for (int lane = 0; lane < 32; lane++) w.at<u32>(d[r])[lane] = out[lane][r];
}

// m8n8k4, f64: every lane one a and one b, two c
static void mma_f64(Warp& w, const Inst& in) {
    if (w.mask != FULL) fault(w, u32(__builtin_ctz(w.mask)), in, "mma without all 32 lanes of the warp");
    const s32* reg = &w.program->pool[size_t(in.more)];
    double out[32][2];
    for (int lane = 0; lane < 32; lane++)
        for (int j = 0; j < 2; j++) {
            double s = w.at<double>(reg[4 + j])[lane];
            for (int k = 0; k < 4; k++)
                s = __builtin_fma(w.at<double>(reg[2])[lane / 4 * 4 + k], w.at<double>(reg[3])[(lane % 4 * 2 + j) * 4 + k], s);
            out[lane][j] = s;
        }
    for (int lane = 0; lane < 32; lane++)
        for (int j = 0; j < 2; j++) w.at<double>(reg[j])[lane] = out[lane][j];
}

// ---- ldmatrix, stmatrix: 8 x 8 matrices of 16 bits, lane 8 m + r has the address of row r of matrix m

static u8* row_pointer(Warp& w, const Inst& in, u32 lane, bool write) {
    const u64 a = in.x[4] < 0          ? u64(in.imm)
                  : in.mod & ADDRESS64 ? w.at<u64>(in.x[4])[lane] + u64(in.imm)
                                       : u32(w.at<u32>(in.x[4])[lane] + u32(in.imm));
    const u64 offset = a >> 60 == SHARED_WINDOW >> 60 ? a - SHARED_WINDOW : a;
    u8* p = shared_pointer(w, lane, in, offset, 16, write);
    if (w.launch->options.race) race_shared(w, lane, in.line, u32(offset), 16, write, nullptr);
    if (write) wrote_shared(w, lane, in, u32(offset), 16);
    return p;
}
// x[0..3] the registers; mod: 8 transposed, 16.. the number of matrices
static void ldmatrix(Warp& w, const Inst& in) {
    if (w.mask != FULL) fault(w, u32(__builtin_ctz(w.mask)), in, "ldmatrix without all 32 lanes of the warp");
    const u32 count = in.mod >> 4;
    u16 m[4][8][8];
    for (u32 i = 0; i < 8 * count; i++) memcpy(m[i / 8][i % 8], row_pointer(w, in, i, false), 16);
    for (u32 k = 0; k < count; k++)
        for (u32 lane = 0; lane < 32; lane++) {
            const u32 r = lane / 4, c = lane % 4 * 2;
            w.at<u32>(in.x[k])[lane] =
                in.mod & 8 ? m[k][c][r] | u32(m[k][c + 1][r]) << 16 : m[k][r][c] | u32(m[k][r][c + 1]) << 16;
        }
}
static void stmatrix(Warp& w, const Inst& in) {
    if (w.mask != FULL) fault(w, u32(__builtin_ctz(w.mask)), in, "stmatrix without all 32 lanes of the warp");
    const u32 count = in.mod >> 4;
    u16 m[4][8][8];
    for (u32 k = 0; k < count; k++)
        for (u32 lane = 0; lane < 32; lane++) {
            const u32 r = lane / 4, c = lane % 4 * 2, v = w.at<u32>(in.x[k])[lane];
            if (in.mod & 8) m[k][c][r] = u16(v), m[k][c + 1][r] = u16(v >> 16);
            else m[k][r][c] = u16(v), m[k][r][c + 1] = u16(v >> 16);
        }
    for (u32 i = 0; i < 8 * count; i++) memcpy(row_pointer(w, in, i, true), m[i / 8][i % 8], 16);
}
// movmatrix: one 8 x 8 matrix transposed across the warp
static void movmatrix(Warp& w, const Inst& in) {
    if (w.mask != FULL) fault(w, u32(__builtin_ctz(w.mask)), in, "movmatrix without all 32 lanes of the warp");
    u16 m[8][8];
    for (u32 lane = 0; lane < 32; lane++) {
        const u32 v = w.at<u32>(in.x[1])[lane];
        m[lane / 4][lane % 4 * 2] = u16(v), m[lane / 4][lane % 4 * 2 + 1] = u16(v >> 16);
    }
    for (u32 lane = 0; lane < 32; lane++)
        w.at<u32>(in.x[0])[lane] = m[lane % 4 * 2][lane / 4] | u32(m[lane % 4 * 2 + 1][lane / 4]) << 16;
}

void add_matrix(Table& t) {
    t.add("mma", mma);
    t.add("mma.f64", mma_f64);
    t.add("ldmatrix", ldmatrix);
    t.add("stmatrix", stmatrix);
    t.add("movmatrix", movmatrix);
}

}  // namespace ptxsim
