// tensors.h: what the launchers of every backend take from torch: checked arguments, results. Not seen by kernels.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "args.h"
#include "checks.h"
#include "library.h"
#include "types.h"

namespace rk {

// A result, which an op has made: nothing of it needs a check but a dtype that the caller named.
inline Out out(const Tensor& t, const char* op) { return {t.mutable_data_ptr(), dtype_of(t.scalar_type(), op, "out_dtype")}; }

constexpr ScalarType scalar_type(Dtype t) {
    return t == Dtype::F32 ? ScalarType::Float : t == Dtype::F16 ? ScalarType::Half : ScalarType::BFloat16;
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
    return torch::stable::new_empty(like, std::vector<int64_t>(shape), dtype);
}
// A result of the shape [R, D] and the dtype that an argument had when it was checked.
inline Tensor like(const Tensor& t, const View& rows) {
    return empty(t, {rows.size[0], rows.size[1]}, scalar_type(rows.dtype));
}

}  // namespace rk
