// tables.cpp: the tile tables of the CUDA rooms as JSON, for `rerank-kernels info --plan`: the CPU library has them too, so
// that a machine without a GPU can print them. {"sm80": {"linear": [tile, ...], "attention": {width: [tile, ...], ...}},
// "sm90":
// {"linear": [tile, ...]}}, where a tile is [rows, columns or keys, threads, bytes of shared memory].

#include <initializer_list>
#include <string>

#include "../cuda/sm80/tiles.h"
#include "../cuda/sm90/tiles.h"
#include "../library.h"

namespace rk {

static void add(std::string& list, const std::string& entry) { list += (list.empty() ? "" : ", ") + entry; }

static std::string tile(std::initializer_list<int> numbers) {
    std::string all;
    for (int n : numbers) add(all, std::to_string(n));
    return "[" + all + "]";
}

static std::string launch_tables() {
    std::string linear, attention, hopper;
    for (const sm90::LinearTile& t : sm90::LINEAR_TILES) add(hopper, tile({t.rows, t.columns, t.threads(), t.shared()}));
    for (const sm80::LinearTile& t : sm80::LINEAR_TILES) add(linear, tile({t.rows, t.columns, t.threads(), t.shared()}));
    for (const sm80::HeadTile& t : sm80::HEAD_TILES) {
        std::string ways;
        for (int way = 0, before = 0; way < sm80::WARP_WAYS; before = t.warps(way++))
            if (const int warps = t.warps(way); warps != before)
                add(ways, tile({warps * sm80::WARP_ROWS, t.keys(), warps * 32, t.shared(warps)}));
        add(attention, "\"" + std::to_string(t.width) + "\": [" + ways + "]");
    }
    return "{\"sm80\": {\"linear\": [" + linear + "], \"attention\": {" + attention + "}}, \"sm90\": {\"linear\": [" + hopper +
           "]}}";
}

RK_TORCH_LIBRARY_IMPL(CompositeExplicitAutograd, m) { m.impl("launch_tables", TORCH_BOX(&launch_tables)); }

}  // namespace rk
