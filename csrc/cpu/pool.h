// pool.h: the threads of the CPU kernels, and how many an op may use. No kernel, no tensor.
//
// Why not PyTorch's OpenMP threads: a region of theirs ends when the last of them has been there, whether there is work left
// for it or not. Beside other processes one of them has always just lost its core, and each of a forward's sixty regions would
// wait for it, while the others spin. Here whoever calls needs nobody: it goes on by itself until no task is left, and waits
// only for the threads that are in the middle of one. Threads that have nothing to do sleep after a moment. And a forked child,
// which has none of its parent's threads, starts its own, where OpenMP waits for ever.
#pragma once

#include <cstdint>

namespace rk {

// A piece of work that several threads may be inside of: claims tasks until there are none.
struct Work {
    void (*run)(void*);  // must not throw
    void* state;
};

// Runs work.run(work.state) on this thread, and on up to `helpers` others while it does; returns when all have left it.
void run_shared(const Work& work, int64_t helpers);

// How many threads an op on this thread may use, itself included: torch.get_num_threads(), or what that was when hold_threads
// began.
int64_t threads();

}  // namespace rk
