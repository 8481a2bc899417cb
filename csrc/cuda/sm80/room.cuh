// room.cuh: what a kernel of this room may ask for. They are compiled for every architecture (toolkit.py, ROOMS).
#pragma once

namespace rk {

constexpr int MAX_SHARED = 99 * 1024;  // bytes of shared memory of one block: what sm_80 to sm_120 all grant

}  // namespace rk

#include "../launch.cuh"
