// barrier.cuh: how the warps of a block hand shared memory to each other on Hopper: mbarriers, named barriers, register counts.
//
// An mbarrier counts arrivals, and bytes where TMA writes for it; with the last one a phase ends and the next begins. Whoever
// waits names the parity of the phase that must have ended: the first phase is 0. On a fresh barrier parity 1 has ended. A wait
// may be one phase behind and no more: two behind, the parities are equal, and it would pass too early.
#pragma once

#include "../device.cuh"

namespace rk::sm90 {

constexpr int GROUP = 128;  // threads of a warpgroup: four warps, which issue wgmma together
// Of a wait: tries at full speed, then such with a nap of about 1 ms before each.
constexpr int TRIES = 1 << 16, NAPS = 1 << 14;

__device__ __forceinline__ unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

struct Barrier {
    unsigned at;  // in shared memory, 8 bytes

    __device__ __forceinline__ Barrier operator[](int i) const { return {at + unsigned(i) * 8}; }
    __device__ __forceinline__ void init(int arrivals) const {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
    }
    __device__ __forceinline__ void arrive() const {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
    }
    // One arrival, and `bytes` that copies will write before the phase ends.
    __device__ __forceinline__ void expect(int bytes) const {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
    }
    // A kernel that would stand for ever traps after many seconds, and CUDA says so. What is right waits for microseconds, and
    // never comes to the naps. They are counted, and no clock is read: a block that was stopped meanwhile has not waited. All
    // in one piece: from a loop in C++ the compiler makes code for which registers do not suffice.
    __device__ __forceinline__ void wait(int parity) const {
        asm volatile(
            "{\n.reg .pred go;\n.reg .u32 tries;\nmov.u32 tries, 0;\nAGAIN:\n"
            "mbarrier.try_wait.parity.shared::cta.b64 go, [%0], %1;\n@go bra ENDED;\nadd.u32 tries, tries, 1;\n"
            "setp.lt.u32 go, tries, %2;\n@go bra AGAIN;\nnanosleep.u32 1000000;\nsetp.lt.u32 go, tries, %3;\n@go bra AGAIN;\n"
            "trap;\nENDED:\n}" ::"r"(at),
            "r"(parity), "n"(TRIES), "n"(TRIES + NAPS)
            : "memory");
    }
};

// After one thread's init, before __syncthreads: the barriers are ready for the block and for TMA.
__device__ __forceinline__ void barriers_are_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// What this thread wrote into shared memory by ordinary stores is there for wgmma and TMA; a barrier must follow where other
// threads issue them.
__device__ __forceinline__ void stores_before_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier of `threads` threads; 0 is __syncthreads' own.
template <int ID>
__device__ __forceinline__ void named_barrier(int threads) {
    asm volatile("bar.sync %0, %1;" ::"n"(ID), "r"(threads) : "memory");
}

// All warps of a warpgroup: from the registers that the kernel was compiled with to fewer, or to more once others gave some.
template <int REGISTERS>
__device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// The number of this thread's warpgroup, which ptxas then knows to be one for the warp.
__device__ __forceinline__ int warpgroup() { return __shfl_sync(WARP, int(threadIdx.x) / GROUP, 0); }

}  // namespace rk::sm90
