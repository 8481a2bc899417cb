// threads.cpp: how many threads an op may use, and the hold on PyTorch's own.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "../library.h"
#include "openmp.h"
#include "pool.h"

namespace rk {

static thread_local int64_t held = 0;

int64_t threads() { return held > 0 ? held : int64_t(torch::stable::get_num_threads()); }

// PyTorch's operations between ours (gathers, copies, a sum) are short, but its OpenMP threads spin for milliseconds after each
// on the cores that ours want next, and hang in a forked child. So for the time of a patched model's forward PyTorch computes
// on the calling thread alone; the number belongs to that thread. count 0 begins and returns what ends it, 0 if there is
// nothing to end: a forward within a forward, another threading library. count -1 only asks how many threads an op may use now.
static int64_t hold_threads(int64_t count) {
    static const auto set = openmp<void (*)(int)>("omp_set_num_threads");
    if (count < 0) return threads();
    if (count > 0) {
        RK_CHECK(set != nullptr && count <= INT32_MAX, "hold_threads", "count must be what began the hold, got ", count);
        held = 0;
        set(int(count));
        return 0;
    }
    const int64_t before = threads();
    if (held > 0 || before == 1 || set == nullptr) return 0;
    set(1);
    if (torch::stable::get_num_threads() != 1) {  // not the OpenMP that PyTorch has
        set(int(before));
        return 0;
    }
    return held = before;
}

RK_TORCH_LIBRARY_IMPL(CompositeExplicitAutograd, m) { m.impl("hold_threads", TORCH_BOX(&hold_threads)); }

}  // namespace rk
