// linear.h: the launcher's side of linear, for the ops that are made of it (score_head, sparse_ffn).
#pragma once

#include <algorithm>

#include "../args.h"
#include "launch.h"

namespace rk {

// Arguments without a residual; y is [M, N].
inline LinearArgs linear_args(const char* op, const Tensor& x, const Tensor& packed, int64_t N,
                              const std::optional<Tensor>& bias, int64_t activation, const Tensor& y) {
    RK_CHECK(N > 0 && x.size(1) > 0, op, "N and K must be > 0");
    RK_CHECK(
        packed.dim() == 3 && packed.size(0) == ceil_div(N, PANEL) && packed.size(1) == x.size(1) && packed.size(2) == PANEL, op,
        "the packed weight does not fit x; pack it again with pack_weight");
    return LinearArgs{x.const_data_ptr(),
                      dtype_of(x, op, "x"),
                      packed.const_data_ptr(),
                      dtype_of(packed, op, "weight"),
                      bias ? bias->const_data_ptr() : nullptr,
                      bias ? dtype_of(*bias, op, "bias") : Dtype::F32,
                      nullptr,
                      Dtype::F32,
                      y.mutable_data_ptr(),
                      dtype_of(y, op, "out_dtype"),
                      x.size(0),
                      N,
                      x.size(1),
                      int(activation)};
}

void run_linear(const LinearArgs&);

// Panel p of a weight [N, K] with any strides (in elements) as [K][PANEL]; columns past N are +0.
template <class T>
void pack_panel(const void* weight, int64_t row_stride, int64_t column_stride, int64_t k_count, int64_t p, int64_t columns,
                void* packed) {
    const T* from = static_cast<const T*>(weight) + p * PANEL * row_stride;
    T* to = static_cast<T*>(packed) + p * k_count * PANEL;
    for (int64_t k = 0; k < k_count; ++k)
        for (int64_t c = 0; c < PANEL; ++c) to[k * PANEL + c] = c < columns ? from[c * row_stride + k * column_stride] : T(0);
}

}  // namespace rk
