// weighing.h: how attention of mode "tensor" makes weights of scores, from its scale and softcap. On the host, for every room
// of csrc/cuda; rerank_kernels/backend/triton/attention.py has the same in Python.
#pragma once

#include <cmath>

namespace rk {

// A weight is exp2_short(s - max, c, least). `scaled`: s is dot * scale, rounded, and then perhaps capped; else it is the dot
// itself, and c holds the scale. So c is always positive, and neither it nor 127 / c leaves the range of normal numbers.
struct Weighing {
    float c, least;
    bool scaled;
};

inline Weighing weighing(float scale, float softcap) {
    constexpr double LOG2_E = 1.4426950408889634, SMALLEST = 0x1p-64, LARGEST = 0x1p64;
    Weighing w{float(double(scale) * LOG2_E), 0.0f, false};
    w.scaled = softcap != 0.0f || !(w.c >= SMALLEST && w.c <= LARGEST);
    if (w.scaled) w.c = float(LOG2_E);
    // the smallest float32 with least * c >= -127; the product of two float32 is exact in double
    w.least = float(-127.0 / double(w.c));
    while (double(w.least) * w.c < -127.0) w.least = std::nextafter(w.least, 0.0f);
    while (double(std::nextafter(w.least, -HUGE_VALF)) * w.c >= -127.0) w.least = std::nextafter(w.least, -HUGE_VALF);
    return w;
}

}  // namespace rk
