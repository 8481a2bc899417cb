"""PyTorch's ops that are exact by nature: no choice of kernel, thread or batch can change a bit of what they give.

By the name without namespace, overload and the "_" of an op in place.
"""

from __future__ import annotations

# What moves, copies or makes values: nothing is computed.
MOVED = frozenset(
    "_conj _neg_view _reshape_alias _reshape_copy _to_copy _unsafe_view alias arange_ as_strided as_strided_scatter broadcast_to "
    "cat chunk clone constant_pad_nd copy detach detach_copy diag_embed diagonal diagonal_copy embedding empty empty_like "
    "empty_permuted empty_strided expand expand_copy expand_as eye fill flatten flip full full_like gather getitem index "
    "index_fill index_select is_pinned lift lift_fresh lift_fresh_copy masked_fill masked_scatter "
    "masked_select movedim narrow narrow_copy new_empty new_empty_strided new_full new_ones new_zeros nonzero ones ones_like "
    "pad permute pin_memory pixel_shuffle pixel_unshuffle reflection_pad1d reflection_pad2d repeat repeat_interleave "
    "replication_pad1d replication_pad2d replication_pad3d reshape resize resize_as roll rot90 scalar_tensor select select_scatter "
    "set slice slice_scatter split split_with_sizes split_with_sizes_copy squeeze squeeze_copy stack swapaxes t take "
    "take_along_dim to transpose tril tril_indices triu triu_indices unbind unflatten unfold unfold_copy unsafe_chunk "
    "unsafe_split unsafe_split_with_sizes unsqueeze unsqueeze_copy upsample_nearest1d upsample_nearest2d upsample_nearest3d "
    "view view_as_complex view_as_real view_copy where zero zeros zeros_like _local_scalar_dense item copy_sparse_to_sparse "
    "_efficientzerotensor im2col channel_shuffle".split()
)

# One IEEE step per element, correctly rounded, so that vector code and its tail agree; or a choice among values.
ONE_STEP = frozenset(
    "abs bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor bucketize ceil clamp clamp_max "
    "clamp_min copysign div eq equal floor fmax fmin frac ge gt hardtanh heaviside isfinite isin isinf isnan "
    "isneginf isposinf le leaky_relu logical_and logical_not logical_or logical_xor lt maximum minimum mul nan_to_num ne neg "
    "nextafter positive reciprocal relu relu6 round searchsorted sgn sign signbit sqrt square threshold trunc "
    "prelu _prelu_kernel one_hot real imag".split()
)

# A choice among the values of a row, where the order of comparing changes nothing.
CHOSEN = frozenset(
    # and counts of them, which are whole numbers
    "aminmax all amax amin any argmax argmin argsort cummax cummin histc is_nonzero kthvalue max max_pool1d max_pool2d "
    "max_pool2d_with_indices max_pool3d_with_indices median min msort sort topk unique_consecutive unique_dim _unique2 "
    "is_same_size allclose".split()
)

# First values of weights, and the state of PyTorch itself.
STATE = frozenset(
    "_assert_async _assert_scalar _assert_tensor_metadata _has_compatible_shallow_copy_type _nested_tensor_size _version "
    "is_complex is_floating_point is_inference is_leaf is_signed normal_ random_ record_stream requires_grad_ result_type "
    "set_data sym_numel sym_size sym_storage_offset sym_stride uniform_ _is_all_true _is_any_true".split()
)

EXACT = MOVED | ONE_STEP | CHOSEN

# With integers alone: no order of adding them changes the sum, and no kernel another number.
EXACT_OF_INTEGERS = frozenset(
    "add sub rsub addcmul arange bincount cumsum cumprod index_add index_put index_reduce linspace mm bmm dot mv addmm pow prod "
    "scatter scatter_add scatter_reduce sum tensordot floor_divide outer".split()
)

REASONS = {
    "random numbers, which depend on what was drawn before": (
        "bernoulli dropout native_dropout multinomial normal rand rand_like randint randint_like randn randn_like randperm "
        "poisson exponential geometric cauchy log_normal rrelu_with_noise"
    ).split(),
    "it adds where indices repeat, in an order of its own": "index_add scatter_add scatter_reduce index_reduce put".split(),
    "a private form of attention; call torch.nn.functional.scaled_dot_product_attention": (
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
        "_scaled_dot_product_cudnn_attention _scaled_dot_product_fused_attention_overrideable _flash_attention_forward "
        "_efficient_attention_forward _native_multi_head_attention _transformer_encoder_layer_fwd"
    ).split(),
}
WHY = {op: why for why, ops in REASONS.items() for op in ops}
