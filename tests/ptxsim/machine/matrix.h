// matrix.h: how a tensor core adds up, for mma.sync and wgmma (matrix.cpp).
#pragma once

namespace ptxsim {

// c + sum of a[i] * b[i]; `step`: how many products mode 2 takes at a time; `least`: the operands' smallest exponent
float accumulate(int mode, float c, const float* a, const float* b, int n, int step, int least);

}  // namespace ptxsim
