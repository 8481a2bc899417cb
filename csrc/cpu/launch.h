// launch.h: what every launcher needs from torch: dtypes, raw pointers, tasks over threads. Not seen by kernels.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "../checks.h"
#include "types.h"

namespace rk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(ScalarType t, const char* op, const char* name) {
    if (t == ScalarType::Float) return Dtype::F32;
    if (t == ScalarType::Half) return Dtype::F16;
    if (t == ScalarType::BFloat16) return Dtype::BF16;
    RK_CHECK(false, op, name, " must be float32, float16 or bfloat16");
    return Dtype::F32;
}
inline Dtype dtype_of(const Tensor& t, const char* op, const char* name) { return dtype_of(t.scalar_type(), op, name); }

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
    return torch::stable::new_empty(like, std::vector<int64_t>(shape), dtype);
}

// f(task) for each task in [0, tasks), handed out one at a time: which thread takes which task is the only thing that
// depends on timing, and no task reads what another writes.
template <class F>
void for_each_task(int64_t tasks, const F& f) {
    const int64_t threads = torch::stable::get_num_threads();
    if (tasks <= 1 || threads <= 1) {
        for (int64_t i = 0; i < tasks; ++i) f(i);
        return;
    }
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads < tasks ? threads : tasks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t worker = begin; worker < end; ++worker)
            for (int64_t i = next.fetch_add(1); i < tasks; i = next.fetch_add(1)) f(i);
    });
}

// Memory of this thread that only grows: no allocation in the steady state.
inline float* scratch(size_t floats, int slot = 0) {
    thread_local std::vector<float> kept[3];
    if (kept[slot].size() < floats) kept[slot].resize(floats);
    return kept[slot].data();
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace rk
