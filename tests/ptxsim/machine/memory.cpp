// memory.cpp: ld and st. Every lane's address is checked for alignment and against the launch's buffers.
//
// x[0..3] are the data (further ones in the pool), x[4] the address register or -1, imm the offset. Addresses become host
// pointers first, then one loop moves the data; a row of neighbours and one address for all lanes are the common cases.
#include <cstdarg>
#include <cstdio>

#include "lanes.h"

namespace ptxsim {

std::string text(const char* format, ...) {
    char b[768];
    va_list a;
    va_start(a, format);
    vsnprintf(b, sizeof b, format, a);
    va_end(a);
    return b;
}

std::string place(const Warp& w, u32 lane, s32 line) {
    const Launch& l = *w.launch;
    const u32 t = w.id * 32 + lane, x = l.block[0], y = l.block[1];
    const u32* c = w.block->ctaid;
    return text("{line %d}, block (%u,%u,%u), thread (%u,%u,%u)", line, c[0], c[1], c[2], t % x, t / x % y, t / x / y);
}

void fault(const Warp& w, u32 lane, const Inst& in, const std::string& what) {
    throw Fault{what + ", " + place(w, lane, in.line)};
}

static std::string verb(u32 bytes, bool write) { return text("%s of %u bytes", write ? "store" : "load", bytes); }

[[noreturn]] static void bad_global(Warp& w, u32 lane, const Inst& in, u64 a, u32 bytes, bool write) {
    const Region* near = nullptr;  // the buffer that it most likely left
    u64 best = ~0ull;
    for (const Region& r : w.launch->regions) {
        const u64 distance = a < r.lo ? r.lo - a : a >= r.hi ? a - r.hi : 0;
        if (distance < best) best = distance, near = &r;
    }
    std::string where = text("address 0x%llx", (unsigned long long)a);
    if (near && best < (1ull << 30))
        where = text("%s%+lld, a buffer of %llu bytes", near->name.c_str(), (long long)(a - near->lo),
                     (unsigned long long)(near->hi - near->lo));
    fault(w, lane, in, "out-of-bounds " + verb(bytes, write) + " at " + where);
}

Region& region_of(Warp& w, u32 lane, const Inst& in, u64 a, u32 bytes, bool write) {
    Launch& l = *w.launch;
    if (l.last_region < l.regions.size()) {
        Region& r = l.regions[l.last_region];
        if (a >= r.lo && a + bytes <= r.hi) return r;
    }
    for (u32 i = 0; i < l.regions.size(); i++) {
        Region& r = l.regions[i];
        if (a >= r.lo && a + bytes <= r.hi) {
            l.last_region = i;
            return r;
        }
    }
    bad_global(w, lane, in, a, bytes, write);
}
[[noreturn]] static void read_only(Warp& w, u32 lane, const Inst& in, const Region& r, u64 a, u32 bytes) {
    fault(w, lane, in,
          verb(bytes, true) + text(" to %s+%llu, which is read-only", r.name.c_str(), (unsigned long long)(a - r.lo)));
}
static void check_aligned(Warp& w, u32 lane, const Inst& in, u64 a, u32 bytes, bool write, const char* space) {
    if (a & (bytes - 1))
        fault(w, lane, in, "misaligned " + verb(bytes, write) + text(" at %s address 0x%llx", space, (unsigned long long)a));
}

u8* global_pointer(Warp& w, u32 lane, const Inst& in, u64 a, u32 bytes, bool write, bool) {
    check_aligned(w, lane, in, a, bytes, write, "global");
    Region& r = region_of(w, lane, in, a, bytes, write);
    if (write && !r.writable) read_only(w, lane, in, r, a, bytes);
    return reinterpret_cast<u8*>(a);
}
u8* shared_pointer(Warp& w, u32 lane, const Inst& in, u64 a, u32 bytes, bool write) {
    check_aligned(w, lane, in, a, bytes, write, "shared");
    if (a + bytes > w.block->shared_bytes || a + bytes < a)
        fault(w, lane, in,
              "out-of-bounds " + verb(bytes, write) +
                  text(" at shared address %lld of a block with %u bytes", (long long)a, w.block->shared_bytes));
    return w.block->shared + a;
}
static u8* local_pointer(Warp& w, u32 lane, const Inst& in, u64 a, u32 bytes, bool write) {
    check_aligned(w, lane, in, a, bytes, write, "local");
    const u32 size = w.program->local_bytes;
    if (a + bytes > size || a + bytes < a)
        fault(w, lane, in,
              "out-of-bounds " + verb(bytes, write) +
                  text(" at local address %lld of a thread with %u bytes", (long long)a, size));
    return w.local + size_t(lane) * size + a;
}
static u8* param_pointer(Warp& w, u32 lane, const Inst& in, u64 a, u32 bytes, bool write) {
    check_aligned(w, lane, in, a, bytes, write, "param");
    if (write || a + bytes > w.launch->param_bytes || a + bytes < a)
        fault(w, lane, in, "out-of-bounds " + verb(bytes, write) + text(" at param address %lld", (long long)a));
    return const_cast<u8*>(w.launch->params) + a;
}
u8* any_pointer(Warp& w, u32 lane, const Inst& in, u64 a, u32 bytes, bool write, bool atomic) {
    switch (a >> 60) {
        case SHARED_WINDOW >> 60: return shared_pointer(w, lane, in, a - SHARED_WINDOW, bytes, write);
        case LOCAL_WINDOW >> 60: return local_pointer(w, lane, in, a - LOCAL_WINDOW, bytes, write);
        case PARAM_WINDOW >> 60: return param_pointer(w, lane, in, a - PARAM_WINDOW, bytes, write);
        default: return global_pointer(w, lane, in, a, bytes, write, atomic);
    }
}

enum Space { GLOBAL, SHARED, LOCAL, PARAM, GENERIC };

template <Space SPACE>
static u8* pointer(Warp& w, u32 lane, const Inst& in, u64 a, u32 bytes, bool write) {
    if constexpr (SPACE == GLOBAL) return global_pointer(w, lane, in, a, bytes, write);
    else if constexpr (SPACE == SHARED) return shared_pointer(w, lane, in, a, bytes, write);
    else if constexpr (SPACE == LOCAL) return local_pointer(w, lane, in, a, bytes, write);
    else if constexpr (SPACE == PARAM) return param_pointer(w, lane, in, a, bytes, write);
    else return any_pointer(w, lane, in, a, bytes, write);
}

static void addresses(Warp& w, const Inst& in, u64* a) {
    const u64 offset = u64(in.imm);
    if (in.x[4] < 0) {
        for (int i = 0; i < 32; i++) a[i] = offset;
    } else if (in.mod & ADDRESS64) {
        const u64* r = w.at<u64>(in.x[4]);
        for (int i = 0; i < 32; i++) a[i] = r[i] + offset;
    } else {
        const u32* r = w.at<u32>(in.x[4]);
        for (int i = 0; i < 32; i++) a[i] = u32(r[i] + u32(offset));
    }
}

// Host pointers for the lanes that run; true: in one piece of `bytes` a lane, lane after lane (all 32 of them).
template <Space SPACE>
static bool resolve(Warp& w, const Inst& in, u32 bytes, bool write, const u64* a, u8** p) {
    const u32 m = w.mask;
    if constexpr (SPACE == GLOBAL || SPACE == SHARED) {
        const u32 first = u32(__builtin_ctz(m));
        u64 lo, hi, base;  // all lanes at once against one buffer
        if constexpr (SPACE == SHARED) {
            lo = 0, hi = w.block->shared_bytes, base = reinterpret_cast<u64>(w.block->shared);
        } else {
            const Region& r = region_of(w, first, in, a[first], bytes, write);
            if (write && !r.writable) read_only(w, first, in, r, a[first], bytes);
            lo = r.lo, hi = r.hi, base = 0;
        }
        u64 bad = 0, gap = 0;
        const u64 last = hi - lo - bytes, low = bytes - 1;
        if (hi - lo < bytes) bad = 1;
        for (u32 i = 0; i < 32; i++) {
            const u64 wrong = (a[i] - lo > last) | ((a[i] & low) != 0);
            bad |= m >> i & 1 ? wrong : 0;
            gap |= a[i] ^ (a[0] + u64(i) * bytes);
            p[i] = reinterpret_cast<u8*>(a[i] + base);
        }
        if (!bad) return gap == 0 && m == FULL;
    }
    each_lane(m, [&](u32 i) { p[i] = pointer<SPACE>(w, i, in, a[i], bytes, write); });
    return false;
}

template <Space SPACE>
static void check_races(Warp& w, const Inst& in, u32 bytes, bool write, const u64* a, const u8* value, u32 stride) {
    each_lane(w.mask, [&](u32 i) {
        const u8* v = value ? value + size_t(i) * stride : nullptr;
        const u32 kind = SPACE == GENERIC ? u32(a[i] >> 60) : SPACE == SHARED ? 1 : SPACE == GLOBAL ? 0 : 2;
        if (kind == 1) race_shared(w, i, in.line, u32(a[i]), bytes, write, v);
        if (kind == 0) race_global(w, i, in.line, region_of(w, i, in, a[i], bytes, write), a[i], bytes, write, v);
    });
}

template <class T>
static T fetch(const u8* p) {
    T v;
    memcpy(&v, p, sizeof v);
    return v;
}

// E: u8, u16, u32 or u64 as stored; N of them a lane.
template <Space SPACE, class E, int N>
static void load(Warp& w, const Inst& in) {
    constexpr u32 BYTES = sizeof(E) * N;
    using C = std::conditional_t<sizeof(E) == 8, u64, u32>;
    alignas(64) u64 a[32];
    u8* p[32];
    addresses(w, in, a);
    const bool row = resolve<SPACE>(w, in, BYTES, false, a, p);
    if (w.launch->options.race) check_races<SPACE>(w, in, BYTES, false, a, nullptr, 0);
    const s32* more = N > 4 ? &w.program->pool[in.more] : nullptr;
    C* d[N];
    for (int k = 0; k < N; k++) {
        const s32 at = k < 4 ? in.x[k] : more[k - 4];
        d[k] = at >= 0 ? w.at<C>(at) : nullptr;
    }
    if constexpr (sizeof(E) < 4) {
        if (in.mod & SIGNED) {  // to the width of the register
            const u32 keep = in.mod & KEEP32 ? FULL : 0xffff;
            each_lane(w.mask, [&](u32 i) {
                for (int k = 0; k < N; k++)
                    if (d[k]) d[k][i] = u32(s32(std::make_signed_t<E>(fetch<E>(p[i] + k * sizeof(E))))) & keep;
            });
            return;
        }
    }
    if (N == 1 && row && sizeof(E) == sizeof(C)) {
        memcpy(d[0], p[0], 32 * sizeof(C));
        return;
    }
    if constexpr (N == 4 && sizeof(E) == 4) {
        if (w.mask == FULL && d[0] && d[1] && d[2] && d[3]) {
            typedef u32 V __attribute__((vector_size(16)));
            for (int i = 0; i < 32; i += 4) {  // 4 x 4 transposed in registers
                const V r0 = fetch<V>(p[i]), r1 = fetch<V>(p[i + 1]), r2 = fetch<V>(p[i + 2]), r3 = fetch<V>(p[i + 3]);
                const V a0 = __builtin_shuffle(r0, r1, V{0, 4, 1, 5}), a1 = __builtin_shuffle(r2, r3, V{0, 4, 1, 5});
                const V b0 = __builtin_shuffle(r0, r1, V{2, 6, 3, 7}), b1 = __builtin_shuffle(r2, r3, V{2, 6, 3, 7});
                *reinterpret_cast<V*>(d[0] + i) = __builtin_shuffle(a0, a1, V{0, 1, 4, 5});
                *reinterpret_cast<V*>(d[1] + i) = __builtin_shuffle(a0, a1, V{2, 3, 6, 7});
                *reinterpret_cast<V*>(d[2] + i) = __builtin_shuffle(b0, b1, V{0, 1, 4, 5});
                *reinterpret_cast<V*>(d[3] + i) = __builtin_shuffle(b0, b1, V{2, 3, 6, 7});
            }
            return;
        }
    }
    for (int k = 0; k < N; k++) {
        C* to = d[k];
        if (!to) continue;
        if (w.mask == FULL) {
            for (int i = 0; i < 32; i++) to[i] = fetch<E>(p[i] + k * sizeof(E));
        } else {
            each_lane(w.mask, [&](u32 i) { to[i] = fetch<E>(p[i] + k * sizeof(E)); });
        }
    }
}

template <Space SPACE, class E, int N>
static void store(Warp& w, const Inst& in) {
    constexpr u32 BYTES = sizeof(E) * N;
    using C = std::conditional_t<sizeof(E) == 8, u64, u32>;
    alignas(64) u64 a[32];
    u8* p[32];
    addresses(w, in, a);
    const bool row = resolve<SPACE>(w, in, BYTES, true, a, p);
    if constexpr (SPACE == SHARED || SPACE == GENERIC)
        if (__builtin_expect(!w.block->generic.empty(), 0))
            each_lane(w.mask, [&](u32 i) {
                if (SPACE == SHARED || a[i] >> 60 == SHARED_WINDOW >> 60) mark_generic(w, i, in, u32(a[i]), BYTES);
            });
    const s32* more = N > 4 ? &w.program->pool[in.more] : nullptr;
    const C* s[N];
    for (int k = 0; k < N; k++) s[k] = w.at<C>(k < 4 ? in.x[k] : more[k - 4]);
    E v[32][N];
    if (N == 1 && row && sizeof(E) == sizeof(C) && !w.launch->options.race) {
        memcpy(p[0], s[0], 32 * sizeof(C));
        return;
    }
    each_lane(w.mask, [&](u32 i) {
        for (int k = 0; k < N; k++) v[i][k] = E(s[k][i]);
    });
    if (w.launch->options.race) {  // lane by lane, so that two lanes of this store are seen to collide
        each_lane(w.mask, [&](u32 i) {
            const u32 all = w.mask;
            w.mask = 1u << i;
            check_races<SPACE>(w, in, BYTES, true, a, reinterpret_cast<const u8*>(v), BYTES);
            w.mask = all;
            memcpy(p[i], v[i], BYTES);
        });
    } else {
        each_lane(w.mask, [&](u32 i) { memcpy(p[i], v[i], BYTES); });
    }
}

template <Space SPACE, class E, int N>
static void add_shape(Table& t, const std::string& space) {
    const std::string n = space + "." + std::to_string(sizeof(E) * 8) + "x" + std::to_string(N);
    t.add("ld." + n, load<SPACE, E, N>);
    if (SPACE != PARAM) t.add("st." + n, store<SPACE, E, N>);
}
template <Space SPACE>
static void add_space(Table& t, const std::string& space) {
    add_shape<SPACE, u8, 1>(t, space);
    add_shape<SPACE, u8, 2>(t, space);
    add_shape<SPACE, u8, 4>(t, space);
    add_shape<SPACE, u16, 1>(t, space);
    add_shape<SPACE, u16, 2>(t, space);
    add_shape<SPACE, u16, 4>(t, space);
    add_shape<SPACE, u16, 8>(t, space);
    add_shape<SPACE, u32, 1>(t, space);
    add_shape<SPACE, u32, 2>(t, space);
    add_shape<SPACE, u32, 4>(t, space);
    add_shape<SPACE, u32, 8>(t, space);
    add_shape<SPACE, u64, 1>(t, space);
    add_shape<SPACE, u64, 2>(t, space);
    add_shape<SPACE, u64, 4>(t, space);
}

void add_memory(Table& t) {
    add_space<GLOBAL>(t, "global");
    add_space<SHARED>(t, "shared");
    add_space<LOCAL>(t, "local");
    add_space<PARAM>(t, "param");
    add_space<GENERIC>(t, "generic");
}

}  // namespace ptxsim
