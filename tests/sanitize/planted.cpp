// planted.cpp: one mistake of each kind that a part of make sanitize looks for. A part that lets its own pass proves nothing.
#include <immintrin.h>

#include <cstdint>

#ifndef RK_ALONE  // beside the library, whose threads the race is between
#include "../../csrc/cpu/pool.h"
#endif

#define RK_PLANTED extern "C" __attribute__((visibility("default"), noinline))

RK_PLANTED float planted_over_read(const float* x, int64_t n) { return x[n]; }
RK_PLANTED void planted_over_write(float* x, int64_t n) { x[n] = 1.0f; }

// What a sanitizer does not look at: the last group of 16, with a lane too many.
RK_PLANTED __attribute__((target("avx512f"))) float planted_masked_over_read(const float* x, int64_t n) {
    return _mm512_cvtss_f32(_mm512_maskz_loadu_ps(__mmask16((2u << n % 16) - 1u), x + n / 16 * 16));
}

RK_PLANTED int planted_overflow(int x) { return x + 1; }

#ifndef RK_ALONE
RK_PLANTED int64_t planted_race(int64_t steps) {
    struct Sum {
        int64_t steps, of;
    } all{steps, 0};
    const auto add = [](void* state) {
        auto& sum = *static_cast<Sum*>(state);
        for (int64_t i = 0; i < sum.steps; ++i) sum.of += i;  // every thread, in one place
    };
    for (int64_t i = 0; i < 100; ++i) rk::run_shared({add, &all}, 3);
    return all.of;
}
#endif
