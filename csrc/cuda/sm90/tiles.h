// tiles.h: the tiles of mode tensor on wgmma: the one place where they stand. The kernels of this room are made of them, their
// launchers choose among them, and `rerank-kernels info --plan` prints them (csrc/cpu/tables.cpp). For every compiler: no CUDA.
#pragma once

namespace rk::sm90 {

constexpr int DEPTH = 64;  // k's of a stage of linear.cu: 128 bytes of a row

// linear.cu: what a block's consumer warpgroups compute. `together`: they share a tile, its rows split; else each has tiles of
// its own, in turns, and one's epilogue runs beside the other's products.
struct LinearTile {
    int rows, columns;  // outputs of a tile
    int groups;         // warpgroups that multiply
    bool together;
    int stages;  // in shared memory
    int slab;    // columns of the epilogue's passes

    constexpr int group_rows() const { return together ? rows / groups : rows; }
    constexpr int stage() const { return (rows + columns) * DEPTH * 2; }
    constexpr int producers() const { return groups > 1 ? 128 : 32; }  // a whole warpgroup where registers change hands
    constexpr int threads() const { return groups * 128 + producers(); }
    constexpr int slabs() const { return groups * 4 * 16 * slab * 4; }  // bytes: a warp's 16 rows of sums
    constexpr int barriers() const { return (2 * stages + 2) * 8; }
    // A model in clocks of a multiprocessor, never held to a GPU; only for speed. Of a stage: a wgmma of n columns takes n / 2,
    // and not less than its latency, since the next one adds to the same sums; bytes come at about 40 a clock. Of an epilogue:
    // instructions for each output, at 70 a clock.
    constexpr double stage_clocks(int rows_there) const {
        const double latency = 33, each = columns / 2.0 > latency ? columns / 2.0 : latency;
        const double products = group_rows() / 64.0 * (together ? groups : 1) * (DEPTH / 16) * each + (groups > 1 ? 0 : 40);
        const double bytes = (rows_there + columns) * DEPTH * 2 / 40.0;
        return products > bytes ? products : bytes;
    }
    constexpr double end_clocks(bool activation) const { return 900 + double(rows) * columns * (activation ? 40 : 7) / 70; }
    constexpr int shared() const { return 1024 + stages * stage() + slabs() + barriers(); }  // the stages begin at an atom
};
constexpr LinearTile LINEAR_TILES[] = {
    {128, 256, 2, true, 4, 64},   //
    {128, 192, 2, true, 5, 32},   //
    {128, 128, 2, false, 6, 64},  //
    {64, 128, 2, false, 8, 64},   //
    {64, 64, 1, true, 8, 64},     //
    {64, 32, 1, true, 10, 32},    //
    {64, 16, 1, true, 12, 8},     //
    {64, 8, 1, true, 12, 8},
};
constexpr int LINEAR_WAYS = sizeof(LINEAR_TILES) / sizeof(LinearTile);

// attention.cu: a block has `groups` warpgroups of GROUP_ROWS rows, tiles of KEYS keys pass through shared memory, in panels of
// 64 features.
constexpr int GROUP_ROWS = 64, KEYS = 128;
constexpr int WORK_BYTES = 128, SEEN_BYTES = 8, ONES_BYTES = 1024;  // what is kept there of its work, of a row, and for sums

struct HeadTile {
    int width, groups;

    // One warpgroup, which fetches for itself; several such blocks share a multiprocessor, and one works while another waits.
    // Else a warpgroup more fetches, and the next tile is begun before this one has ended.
    constexpr bool solo() const { return groups == 1; }
    constexpr int stages() const { return solo() && width > 64 ? 1 : 2; }
    constexpr int blocks() const { return !solo() ? 1 : width > 64 ? 2 : 3; }  // of a multiprocessor
    constexpr int threads() const { return (groups + (solo() ? 0 : 1)) * 128; }
    constexpr int consumer_registers() const { return groups == 3 ? 160 : 240; }
    constexpr int producer_registers() const { return groups == 3 ? 32 : 24; }
    constexpr int rows() const { return groups * GROUP_ROWS; }
    constexpr int shared() const {
        const int barriers = (4 * stages() + 1) * 8;
        return 1024 + (rows() + 2 * stages() * KEYS) * width * 2 + ONES_BYTES + WORK_BYTES + barriers + rows() * SEEN_BYTES;
    }
};
// Ways 0 and 1 of each width.
constexpr int HEAD_WIDTHS[] = {64, 128}, HEAD_WAYS = 2;
constexpr HeadTile head_tile(int width, int way) { return {width, way == 1 ? 1 : width > 64 ? 2 : 3}; }

}  // namespace rk::sm90
