// launch.cpp: the launchers' choices, and the op by which tests force them.

#include <cstring>
#include <string>

#include "launch.h"

namespace rk {

Choice*& Choice::first() {
    static Choice* list = nullptr;
    return list;
}

bool Choice::is_forced(const char* kernel) {
    for (const Choice* c = first(); c != nullptr; c = c->next)
        if (c->forced >= 0 && std::strcmp(c->kernel, kernel) == 0) return true;
    return false;
}

static std::string launchers() {
    std::string all;
    for (Choice* c = Choice::first(); c != nullptr; c = c->next)
        all += (all.empty() ? "" : ", ") + std::string(c->kernel) + " " + std::to_string(c->count);
    return all;
}

static std::string force_launch(std::string kernel, int64_t way) {
    Choice* c = Choice::first();
    while (c != nullptr && kernel != c->kernel) c = c->next;
    RK_CHECK(c != nullptr, "force_launch", "kernel must be one of ", launchers().c_str(), ", got ", kernel.c_str());
    RK_CHECK(-1 <= way && way < c->count, "force_launch", "way must be from -1 (its own choice) to ", c->count - 1, ", got ",
             way);
    c->forced = int(way);
    return launchers();
}

RK_TORCH_LIBRARY_IMPL(CompositeExplicitAutograd, m) {
    m.impl("launchers", TORCH_BOX(&launchers));
    m.impl("force_launch", TORCH_BOX(&force_launch));
}

}  // namespace rk
