// launch.cpp: the launchers' choices, the op by which tests and trials force them, and the one that opens a room.

#include <cstring>
#include <string>
#include <vector>

#include "launch.h"

namespace rk {

Choice*& Choice::first() {
    static Choice* list = nullptr;
    return list;
}

Choice* Choice::named(const char* kernel) {
    Choice* c = first();
    while (c != nullptr && std::strcmp(c->kernel, kernel) != 0) c = c->next;
    return c;
}

static thread_local std::vector<int> forced_ways;  // by number; -1 and what is past the end: none

int Choice::forced() const { return number < forced_ways.size() ? forced_ways[number] : -1; }

void Choice::force(int way) const {
    if (number >= forced_ways.size()) forced_ways.resize(number + 1, -1);
    forced_ways[number] = way;
}

constexpr int DEVICES = 64;  // of which a launcher knows whether it may serve

bool asked(const char* launcher, const char* everywhere, int device) {
    const Choice *own = Choice::named(launcher), *other = Choice::named(everywhere);
    if (own == nullptr || (other != nullptr && other->forced() >= 0)) return false;
    return own->forced() >= 0 || (0 <= device && device < DEVICES && (own->devices >> device & 1) != 0);
}

static std::string launchers() {
    std::string all;
    for (Choice* c = Choice::first(); c != nullptr; c = c->next)
        all += (all.empty() ? "" : ", ") + std::string(c->kernel) + " " + std::to_string(c->count);
    return all;
}

static std::string force_launch(std::string kernel, int64_t way) {
    const Choice* c = Choice::named(kernel.c_str());
    RK_CHECK(c != nullptr, "force_launch", "kernel must be one of ", launchers().c_str(), ", got ", kernel.c_str());
    RK_CHECK(-1 <= way && way < c->count, "force_launch", "way must be from -1 (its own choice) to ", c->count - 1, ", got ",
             way);
    c->force(int(way));
    return launchers();
}

static bool open_room(std::string kernel, int64_t device, bool open) {
    Choice* c = Choice::named(kernel.c_str());
    RK_CHECK(c != nullptr, "open_room", "kernel must be one of ", launchers().c_str(), ", got ", kernel.c_str());
    RK_CHECK(0 <= device && device < DEVICES, "open_room", "device must be from 0 to ", DEVICES - 1, ", got ", device);
    const uint64_t bit = uint64_t(1) << device;
    open ? c->devices |= bit : c->devices &= ~bit;
    return open;
}

RK_TORCH_LIBRARY_IMPL(CompositeExplicitAutograd, m) {
    m.impl("launchers", TORCH_BOX(&launchers));
    m.impl("force_launch", TORCH_BOX(&force_launch));
    m.impl("open_room", TORCH_BOX(&open_room));
}

}  // namespace rk
