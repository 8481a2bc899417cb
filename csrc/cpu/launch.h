// launch.h: what every CPU launcher needs: tasks over threads, floats as the contract wants them, scratch. Not seen by kernels.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "../tensors.h"
#include "pool.h"
#include "types.h"

namespace rk {

// The contract's floating point, whatever the process has set (torch.set_flush_denormal, a fast-math library): subnormals kept,
// round to nearest even. The setting belongs to a thread, so every thread that computes holds one of these.
class ContractFloats {
   public:
    ContractFloats(const ContractFloats&) = delete;
#ifdef __x86_64__
    ContractFloats() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
    ~ContractFloats() { _mm_setcsr(saved_); }

   private:
    unsigned saved_;
#else
    ContractFloats() {}
    ~ContractFloats() {}
#endif
};

// f(task) for each task in [0, tasks), handed out one at a time: which thread takes which task is the only thing that
// depends on timing, and no task reads what another writes. What f throws stops the rest and reaches the caller.
template <class F>
void for_each_task(int64_t tasks, const F& f) {
    const int64_t threads = std::min(tasks, rk::threads());
    if (threads <= 1) {
        const ContractFloats floats;
        for (int64_t i = 0; i < tasks; ++i) f(i);
        return;
    }
    struct Tasks {
        const F& f;
        const int64_t count;
        std::atomic<int64_t> next{0};
        std::atomic<bool> failed{false};
        std::exception_ptr error{};
    } all{f, tasks};
    const auto claim = [](void* state) {
        auto& of = *static_cast<Tasks*>(state);
        const ContractFloats floats;
        try {
            for (int64_t i = of.next.fetch_add(1); i < of.count; i = of.next.fetch_add(1)) of.f(i);
        } catch (...) {
            of.next.store(of.count);
            if (!of.failed.exchange(true)) of.error = std::current_exception();
        }
    };
    run_shared({claim, &all}, threads - 1);
    if (all.failed) std::rethrow_exception(all.error);
}

// Memory of this thread that only grows, on a cache line: no allocation in the steady state.
inline float* scratch(size_t floats) {
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };
    thread_local std::unique_ptr<float, Free> kept;
    thread_local size_t size = 0;
    if (size < floats) {
        size = 0;
        kept.reset();  // before the new one is there: the old contents are nobody's
        if (floats > size_t(PTRDIFF_MAX) / sizeof(float) - 64) throw std::bad_alloc();
        kept.reset(static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)));
        if (!kept) throw std::bad_alloc();
        size = floats;
    }
    return kept.get();
}

// The offsets of packed sequences, which kernels trust: a copy, and the copy is checked. The caller's memory may be shared, and
// change at any time.
inline std::vector<int32_t> checked_offsets(const Arguments& in, const char* name, const Tensor& cu_seqlens, int64_t total) {
    const View given = in.offsets(name, cu_seqlens);
    std::vector<int32_t> cu(given.as<int32_t>(), given.as<int32_t>() + given.numel);
    const bool ascending = cu.front() == 0 && cu.back() == total && std::is_sorted(cu.begin(), cu.end());
    RK_CHECK(ascending, in.op(), name, " must ascend from 0 to ", total, ", the number of tokens");
    return cu;
}

// Beginnings and ends of keys that may lie anywhere among `total` places: a copy too. Two sequences may share keys.
inline std::vector<int32_t> checked_spans(const Arguments& in, const char* name, const Tensor& spans, int64_t B,
                                          int64_t total) {
    const View given = in.spans(name, spans, B);
    std::vector<int32_t> at(given.as<int32_t>(), given.as<int32_t>() + given.numel);
    for (int64_t b = 0; b < B; ++b)
        RK_CHECK(0 <= at[b] && at[b] <= at[B + b] && at[B + b] <= total, in.op(), name, " must lie between 0 and ", total,
                 ", the number of places of keys, each beginning before its end");
    return at;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace rk
