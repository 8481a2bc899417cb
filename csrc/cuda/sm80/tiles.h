// tiles.h: the tiles of mode tensor on mma.sync: the one place where they stand. The kernels of this room are made of them,
// their launchers choose among them, and `rerank-kernels info --plan` prints them (csrc/cpu/tables.cpp). For every compiler: no
// CUDA.
#pragma once

namespace rk::sm80 {

constexpr int STEP = 16;  // k's of one mma

// linear.cu: what a block computes, and for the launcher what it costs.
struct LinearTile {
    int rows, columns, depth;             // outputs; k's of a stage
    int warp_rows, warp_columns, stages;  // outputs of a warp; stages in shared memory
    int least_blocks;                     // of a multiprocessor: bounds the registers
    // Fitted to an H100 in bfloat16, within 8 %; only for speed. How many blocks a multiprocessor holds; nanoseconds for 16 k's
    // of a block that is alone there and of as many as it holds, and to begin and end one.
    int resident;
    double alone, full, ends;

    constexpr int threads() const { return 32 * (rows / warp_rows) * (columns / warp_columns); }
    constexpr int shared() const { return stages * (rows + columns) * depth * 2; }
};
constexpr LinearTile LINEAR_TILES[] = {
    {128, 256, 32, 64, 64, 4, 1, 1, 284, 328, 5700},  //
    {128, 128, 64, 64, 64, 3, 1, 2, 151, 296, 4600},  //
    {128, 64, 64, 64, 32, 3, 2, 3, 96, 260, 2700},    //
    {64, 64, 64, 32, 32, 3, 3, 4, 68, 219, 1700},     //
    {32, 32, 64, 16, 16, 6, 4, 4, 41, 106, 1350},     //
    {16, 32, 64, 16, 8, 8, 4, 4, 36, 80, 1500},
};
constexpr int LINEAR_WAYS = sizeof(LINEAR_TILES) / sizeof(LinearTile);

// attention.cu: a warp has WARP_ROWS rows, a block 8, 4 or 2 warps; a tile of keys passes through shared memory in parts.
constexpr int WARP_ROWS = 16, PART = 64, MOST_WARPS = 8, WARP_WAYS = 3;
constexpr int WORK_BYTES = 128, ROW_BYTES = 24;  // what is kept there of a block's work, and of a row

struct HeadTile {
    int width;  // that a head is filled up to

    // of a tile: with the head's features alone it is in the expression of an output (NUMERICS.md, "Mode tensor")
    constexpr int keys() const { return width <= 128 ? 128 : 64; }
    // With 64 features three blocks share a multiprocessor's registers, and Q would be too much.
    constexpr bool q_in_registers() const { return width <= 128 && width != 64; }
    constexpr int stages() const { return width <= 192 ? 3 : 2; }
    // of a block, in way 0, 1 or 2; for a wide head not 8, for the shared memory that Q takes
    constexpr int warps(int way) const {
        const int wanted = MOST_WARPS >> way, most = width <= 128 ? MOST_WARPS : 4;
        return wanted < most ? wanted : most;
    }
    constexpr int shared(int warps) const {
        const int q = q_in_registers() ? 0 : warps * 32 * (width / STEP) * 16;
        return WORK_BYTES + stages() * PART * width * 2 + q + warps * WARP_ROWS * ROW_BYTES;
    }
};
constexpr HeadTile HEAD_TILES[] = {{32}, {64}, {96}, {128}, {192}, {256}};

}  // namespace rk::sm80
