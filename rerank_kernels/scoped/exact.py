"""PyTorch's ops that are exact by nature: no choice of kernel, thread or batch can change a bit of what they give.

By the name without namespace and overload, and without the "_" of an op in place.
"""

from __future__ import annotations


def names(listed: str) -> frozenset[str]:
    return frozenset(listed.split())


# What moves, copies or makes values: nothing is computed.
MOVED = names(
    """
    alias as_strided as_strided_scatter broadcast_to cat channel_shuffle chunk clone _conj constant_pad_nd copy
    copy_sparse_to_sparse detach detach_copy diag_embed diagonal diagonal_copy _efficientzerotensor embedding empty
    empty_like empty_permuted empty_strided expand expand_as expand_copy eye fill flatten flip full full_like gather
    im2col index index_fill index_select is_pinned item lift lift_fresh lift_fresh_copy _local_scalar_dense masked_fill
    masked_scatter masked_select movedim narrow narrow_copy _neg_view new_empty new_empty_strided new_full new_ones
    new_zeros nonzero ones ones_like pad permute pin_memory pixel_shuffle pixel_unshuffle reflection_pad1d
    reflection_pad2d repeat repeat_interleave replication_pad1d replication_pad2d replication_pad3d reshape
    _reshape_alias _reshape_copy resize resize_as roll rot90 scalar_tensor select select_scatter set slice slice_scatter
    split split_with_sizes split_with_sizes_copy squeeze squeeze_copy stack swapaxes t take take_along_dim to _to_copy
    transpose tril tril_indices triu triu_indices unbind unflatten unfold unfold_copy unsafe_chunk _unsafe_index
    unsafe_split unsafe_split_with_sizes _unsafe_view unsqueeze unsqueeze_copy upsample_nearest1d upsample_nearest2d
    upsample_nearest3d view view_as_complex view_as_real view_copy where zero zeros zeros_like
    """
)

# One IEEE step per element, correctly rounded, so that vector code and the code behind it agree; or a choice among values.
ONE_STEP = names(
    """
    abs bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor bucketize ceil copysign
    div eq equal floor frac ge gt heaviside imag isfinite isin isinf isnan isneginf isposinf le leaky_relu logical_and
    logical_not logical_or logical_xor lt mul nan_to_num ne neg nextafter one_hot positive prelu _prelu_kernel real
    reciprocal round searchsorted sgn sign signbit square trunc
    """
)

# A choice among the values of a row, where the order of comparing changes nothing; and counts of them, which are whole numbers.
CHOSEN = names(
    """
    all allclose any argmax argmin argsort cummax cummin histc is_nonzero is_same_size kthvalue max max_pool1d
    max_pool2d max_pool2d_with_indices max_pool3d_with_indices median min msort sort topk _unique2 unique_consecutive
    unique_dim
    """
)

# First values of weights, and questions about a tensor; by the whole name, "_" included.
STATE = names(
    """
    _assert_async _assert_scalar _assert_tensor_metadata _is_all_true _is_any_true is_complex is_floating_point
    is_inference is_leaf is_signed normal_ random_ record_stream requires_grad_ result_type set_data sym_numel sym_size
    sym_storage_offset sym_stride uniform_ _version
    """
)

EXACT = MOVED | ONE_STEP | CHOSEN

# With whole numbers alone: no order of adding them changes the sum.
EXACT_OF_INTEGERS = names(
    """
    add addcmul addmm amax amin aminmax arange bincount bmm clamp clamp_max clamp_min cumprod cumsum dot floor_divide
    fmod index_add index_put index_reduce linspace maximum minimum mm mv outer pow prod remainder rsub scatter
    scatter_add scatter_reduce sub sum tensordot
    """
)

# Why other ops have no route, for the message.
REASONS = {
    "random numbers, which depend on what was drawn before": names(
        """
        bernoulli cauchy dropout exponential geometric log_normal multinomial native_dropout normal poisson rand
        rand_like randint randint_like randn randn_like randperm rrelu_with_noise
        """
    ),
    "it adds where indices repeat, in an order of its own": names(
        """
        index_reduce put scatter_add scatter_reduce
        """
    ),
    "a private form of attention; call torch.nn.functional.scaled_dot_product_attention": names(
        """
        _efficient_attention_forward _flash_attention_forward _native_multi_head_attention
        _scaled_dot_product_cudnn_attention _scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention
        _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_fused_attention_overrideable
        _transformer_encoder_layer_fwd
        """
    ),
}
WHY = {op: why for why, ops in REASONS.items() for op in ops}
