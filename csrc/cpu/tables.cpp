// tables.cpp: the tile tables of the CUDA rooms as JSON, for `rerank-kernels info --plan`: the CPU library has them too, so
// that a machine without a GPU can print them. Of each room, "sm80" and "sm90": {"linear": [tile, ...], "attention":
// {width: [tile, ...], ...}}, where a tile is [rows, columns or keys, threads, bytes of shared memory].

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
    std::string linear, attention, hopper, hopper_attention;
    for (const sm90::LinearTile& t : sm90::LINEAR_TILES) add(hopper, tile({t.rows, t.columns, t.threads(), t.shared()}));
    for (const sm80::LinearTile& t : sm80::LINEAR_TILES) add(linear, tile({t.rows, t.columns, t.threads(), t.shared()}));
    for (const sm80::HeadTile& t : sm80::HEAD_TILES) {
        std::string ways;
        for (int way = 0, before = 0; way < sm80::WARP_WAYS; before = t.warps(way++))
            if (const int warps = t.warps(way); warps != before)
                add(ways, tile({warps * sm80::WARP_ROWS, t.keys(), warps * 32, t.shared(warps)}));
        add(attention, "\"" + std::to_string(t.width) + "\": [" + ways + "]");
    }
    for (const int width : sm90::HEAD_WIDTHS) {
        std::string ways;
        for (int way = 0; way < sm90::HEAD_WAYS; ++way) {
            const sm90::HeadTile t = sm90::head_tile(width, way);
            add(ways, tile({t.rows(), sm90::KEYS, t.threads(), t.shared()}));
        }
        add(hopper_attention, "\"" + std::to_string(width) + "\": [" + ways + "]");
    }
    return "{\"sm80\": {\"linear\": [" + linear + "], \"attention\": {" + attention + "}}, \"sm90\": {\"linear\": [" + hopper +
           "], \"attention\": {" + hopper_attention + "}}}";
}

RK_TORCH_LIBRARY_IMPL(CompositeExplicitAutograd, m) { m.impl("launch_tables", TORCH_BOX(&launch_tables)); }

}  // namespace rk
