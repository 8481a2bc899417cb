// tensors.h: what the launchers of every backend take from torch: tensors, dtypes, sizes. Not seen by kernels.
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

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(ScalarType t, const char* op, const char* name) {
    if (t == ScalarType::Float) return Dtype::F32;
    if (t == ScalarType::Half) return Dtype::F16;
    if (t == ScalarType::BFloat16) return Dtype::BF16;
    RK_CHECK(false, op, name, " must be float32, float16 or bfloat16");
    return Dtype::F32;
}
inline Dtype dtype_of(const Tensor& t, const char* op, const char* name) { return dtype_of(t.scalar_type(), op, name); }

// An argument that may be absent: its dtype is then never looked at.
inline Dtype dtype_of(const std::optional<Tensor>& t, const char* op, const char* name) {
    return t ? dtype_of(*t, op, name) : Dtype::F32;
}

inline Ref ref(const Tensor& t, const char* op, const char* name) { return {t.const_data_ptr(), dtype_of(t, op, name)}; }
inline Ref ref(const std::optional<Tensor>& t, const char* op, const char* name) { return t ? ref(*t, op, name) : Ref{}; }
inline Out out(const Tensor& t, const char* op, const char* name) { return {t.mutable_data_ptr(), dtype_of(t, op, name)}; }

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
    return torch::stable::new_empty(like, std::vector<int64_t>(shape), dtype);
}

}  // namespace rk
