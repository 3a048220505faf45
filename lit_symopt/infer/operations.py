"""The names of operations, by what they do to entries."""

from __future__ import annotations


def _set(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Entries stay where they are.
COPIES = _set("clone contiguous _to_copy to detach alias lift lift_fresh lift_fresh_copy positive _conj resolve_conj")
# Entries change places; the first argument is the tensor, the others say how.
SELECTIONS = _set("index index_select gather take_along_dim")
MOVES = SELECTIONS | _set(
    """transpose t permute expand unsqueeze squeeze select slice split split_with_sizes unbind chunk narrow unfold flip
    roll repeat diagonal movedim repeat_interleave tile unsafe_split unsafe_split_with_sizes unsafe_chunk swapaxes
    expand_as mT"""
)
RESHAPES = _set("view _unsafe_view reshape _reshape_alias unflatten flatten")
COMPLEX = _set("view_as_complex view_as_real")
VIEWS = COPIES | MOVES | RESHAPES | COMPLEX | _set("constant_pad_nd as_strided")

# What was in memory before counts for nothing, nor does what the shape is taken from.
FILLS = _set(
    """bernoulli uniform normal random exponential geometric fill zero zeros ones full empty rand randn randint eye
    scalar_tensor empty_strided zeros_like ones_like full_like empty_like rand_like randn_like randint_like new_zeros
    new_ones new_full new_empty new_empty_strided"""
)
POSITIONAL = _set("arange cumsum linspace")

# Entry by entry. Any operation that torch tags as pointwise and that is not here bends.
ADDITIONS = _set("add sub rsub where masked_fill lerp addcmul")
PRODUCTS = _set("mul div true_divide")
STRAIGHT_OPS = _set("neg real imag")
ACTIVATIONS = _set("log_sigmoid_forward hardswish _prelu_kernel rrelu_with_noise")  # pointwise, but not tagged so
CLIPS = _set("clamp clamp_min clamp_max hardtanh nan_to_num round minimum maximum")

REDUCTIONS = _set(
    """mean sum var std var_mean std_mean amax amin max min norm linalg_vector_norm prod any all nansum aminmax"""
)
SOFTMAXES = _set("_softmax _safe_softmax softmax _log_softmax log_softmax")
CHOICES = _set("topk sort max min kthvalue msort")

# Where the two factors of a matrix product are among the arguments, and the summand if there is one.
FACTORS: dict[str, tuple[int, int, int | None]] = {
    **dict.fromkeys(_set("mm bmm mv dot vdot matmul _grouped_mm grouped_mm_fallback"), (0, 1, None)),
    **dict.fromkeys(_set("addmm baddbmm addbmm addmv _addmm_activation"), (1, 2, 0)),
    "linear": (0, 1, 2),
}
ATTENTIONS = frozenset(
    f"_scaled_dot_product_{name}"
    for name in (
        "flash_attention_for_cpu",
        "flash_attention",
        "efficient_attention",
        "cudnn_attention",
        "fused_attention_overrideable",
    )
)
RECURRENT = _set("mkldnn_rnn_layer _cudnn_rnn miopen_rnn lstm gru _thnn_fused_lstm_cell _thnn_fused_gru_cell")
CONVOLUTIONS = _set("convolution _convolution mkldnn_convolution cudnn_convolution")

# Where input, gain and bias of a norm are among the arguments.
NORMS: dict[str, tuple[int, int, int | None]] = {
    "native_layer_norm": (0, 2, 3),
    **dict.fromkeys(_set("_fused_rms_norm rms_norm"), (0, 2, None)),
    **dict.fromkeys(
        _set(
            """native_group_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
            _batch_norm_with_update cudnn_batch_norm"""
        ),
        (0, 1, 2),
    ),
}
# Where the target and what is written into it are among the arguments.
SCATTERS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(_set("index_put masked_scatter"), (0, 2)),
    **dict.fromkeys(_set("index_add index_copy scatter scatter_add scatter_reduce"), (0, 3)),
    **dict.fromkeys(_set("slice_scatter select_scatter"), (0, 1)),
}
