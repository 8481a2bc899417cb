// kernels.h: what torch/, which knows no kernel, and the rooms of kernels, which know no torch, have in common. A launcher is
// declared in the torch/<family>.cpp that calls it; here stand those that several files call. Pointers are device memory;
// no launcher waits for the device or allocates.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "../args.h"

namespace rk {

using Stream = void*;  // a cudaStream_t; the torch side needs no CUDA header for it

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A launcher that can serve a call in several ways (tile sizes, one or two kernels) has one of these. Every way serves every
// call with the same bits; `take` says which: its own choice by shape, or what was forced (op force_launch). A way is forced
// for the calls of one thread alone: a trial on one thread must not change what serves another.
class Choice {
   public:
    Choice(const char* kernel, int count) : kernel(kernel), count(count), next(first()), number(next ? next->number + 1 : 0) {
        first() = this;
    }
    int take(int own) const { return forced() < 0 ? own : forced(); }
    int forced() const;  // -1: none is; this and what follows is in launch.cpp
    void force(int way) const;
    const char* const kernel;
    const int count;
    Choice* const next;
    const size_t number;
    // Of a room that is opened after a trial: a bit for each device on which it may serve (op open_room).
    std::atomic<uint64_t> devices = 0;
    static Choice*& first();                   // of the list of all
    static Choice* named(const char* kernel);  // null if there is none
};

// ---- linear, and bmm: `batches` products side by side, x [batches, M, K], weight [batches, N, K], out [batches, M, N].
// `workspace` is float32 of linear_workspace(args, batches) elements, 0 if none is needed
int64_t linear_workspace(const LinearArgs& args, int64_t batches);
void linear(const char* op, const LinearArgs& args, int64_t batches, float* workspace, Stream stream);
// mode tensor: x and weight are half precision, both of one dtype
void linear_tensor(const char* op, const LinearArgs& args, int64_t batches, Stream stream);

// ---- attention
// Where B sequences lie, int32 on the device; the values are not known here.
struct PackedArgs {
    const int32_t* cu_seqlens;             // [B + 1], offsets of the queries, total in all
    const int32_t *keys_begin, *keys_end;  // [B] each, of the keys among total_k places; they lie apart or in one another
    int64_t B, total, total_k;
    int64_t most_keys;  // about as many as there are of all sequences: for the choice of a way
};
void attention(const AttentionArgs& args, const PackedArgs& packed, Stream stream);
// mode "tensor": float16 or bfloat16, D <= 256
void attention_tensor(const AttentionArgs& args, const PackedArgs& packed, Stream stream);

// Launchers of a room that a build may lack, since it is compiled for one architecture (toolkit.py, ROOMS); its files put them
// here when the library is loaded. Each says whether it took the call: not on another GPU, nor where its way to memory does not
// fit. Then the launcher of the room for every GPU serves, with the same bits; so it does where a test forced a way of it, and
// on each device where nobody has opened this room: backend/native/hopper.py does, after a trial.
struct HopperRoom {
    bool (*linear_tensor)(const char* op, const LinearArgs& args, int64_t batches, Stream stream) = nullptr;
    bool (*attention_tensor)(const AttentionArgs& args, const PackedArgs& packed, Stream stream) = nullptr;
};
inline HopperRoom hopper;
// Whether a launcher of such a room is asked; `everywhere` is the one for every GPU.
bool asked(const char* launcher, const char* everywhere, int device);

}  // namespace rk
