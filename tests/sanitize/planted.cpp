// planted.cpp: one mistake of each kind that a part of make sanitize looks for. A part that lets its own pass proves nothing.
#include <immintrin.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

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
// Every thread adds in one place. Relaxed: the count of those inside orders nothing.
RK_PLANTED int64_t planted_race(int64_t patience) {
    struct Sum {
        std::atomic<int64_t> inside, patience;
        int64_t of;
    } all{0, patience, 0};
    const auto add = [](void* state) {
        auto& sum = *static_cast<Sum*>(state);
        sum.inside.fetch_add(1, std::memory_order_relaxed);
        while (sum.inside.load(std::memory_order_relaxed) < 2 && sum.patience.fetch_sub(1, std::memory_order_relaxed) > 0)
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        for (int64_t i = 0; i < 1000; ++i) sum.of += i;
    };
    rk::run_shared({add, &all}, 3);
    return all.of;
}
#endif
