// checks.h: what C++ still checks, in one message shape. Shapes and dtypes are checked in rerank_kernels/ops/*.py, where the
// message can say what would work; here stand the few conditions without which a kernel would read outside its arguments.
#pragma once

#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/Exception.h>

#define RK_CHECK(condition, op, ...) STD_TORCH_CHECK(condition, op, ": ", __VA_ARGS__)
