// attention.h: what attention's launchers check of their tensors, whatever the backend.
#pragma once

#include <algorithm>
#include <cmath>

#include "tensors.h"

namespace rk {

struct CheckedAttention {
    AttentionArgs args;  // without out
    int64_t total, total_k;
    ScalarType dtype;
};

// q [total, H, D], k and v [total_k, H_kv, D].
template <class In>
CheckedAttention checked_attention(const In& in, const Tensor& q_given, const Tensor& k_given, const Tensor& v_given,
                                   int64_t left, int64_t right, double scale, double softcap) {
    constexpr Lies LIE = Lies::FEATURES_TOGETHER;
    const View q = in.floats("q", q_given, {{"total"}, {"H"}, {"D"}}, LIE);
    const int64_t H = q.size[1], D = q.size[2];
    const View k = in.floats("k", k_given, {{"total_k"}, {"H_kv"}, {"D", D}}, LIE);
    const int64_t total_k = k.size[0], H_kv = k.size[1];
    const View v = in.floats("v", v_given, {{"total_k", total_k}, {"H_kv", H_kv}, {"D", D}}, LIE);
    RK_CHECK(k.dtype == q.dtype && v.dtype == q.dtype, in.op(),
             "k and v must be of the dtype of q; convert them with .to(q.dtype)");
    RK_CHECK(D > 0 && H > 0 && H_kv > 0 && H % H_kv == 0, in.op(), "H must be a multiple of H_kv, and D > 0, got H = ", H,
             ", H_kv = ", H_kv, ", D = ", D);
    RK_CHECK(left >= -1 && right >= -1, in.op(), "left and right must be >= 0, or -1 for no limit, got ", left, " and ", right);
    const float factor = float(scale);
    RK_CHECK(std::isfinite(scale) && std::isfinite(factor), in.op(), "scale must be finite as a float32, got ", scale);
    const float cap = float(softcap);
    RK_CHECK(softcap == 0.0 || (std::isfinite(cap) && cap > 0.0f), in.op(),
             "softcap must be finite and > 0 as a float32, or 0 for none, got ", softcap);
    constexpr int64_t FARTHEST = 0x7fffffff;  // no place is farther away: offsets are int32
    return {.args = {.q = q.data,
                     .k = k.data,
                     .v = v.data,
                     .q_token = q.stride[0],
                     .q_head = q.stride[1],
                     .k_token = k.stride[0],
                     .k_head = k.stride[1],
                     .v_token = v.stride[0],
                     .v_head = v.stride[1],
                     .dtype = q.dtype,
                     .out = nullptr,
                     .H = H,
                     .H_kv = H_kv,
                     .D = D,
                     .left = std::min(left, FARTHEST),
                     .right = std::min(right, FARTHEST),
                     .scale = factor,
                     .softcap = cap},
            .total = q.size[0],
            .total_k = total_k,
            .dtype = scalar_type(q.dtype)};
}

// Whose keys are whose, two numbers a sequence: offsets of packed keys, or beginnings and ends of keys that lie anywhere.
struct CheckedKeys {
    const int32_t *begins, *ends;  // [B] each
    int64_t B;
    bool anywhere;
};
template <class In>
CheckedKeys checked_keys(const In& in, const std::optional<Tensor>& given, const View& queries) {
    const int64_t B = queries.numel - 1;
    if (given && given->dim() == 2) {
        const View spans = in.spans("cu_seqlens_k", *given, B);
        return {spans.as<int32_t>(), spans.as<int32_t>() + B, B, true};
    }
    const View own = given ? in.offsets("cu_seqlens_k", *given) : queries;
    RK_CHECK(own.numel == queries.numel, in.op(), "cu_seqlens_k must have as many sequences as cu_seqlens");
    return {own.as<int32_t>(), own.as<int32_t>() + 1, B, false};
}

}  // namespace rk
