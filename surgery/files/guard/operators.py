"""The operators that a program in a file may call, by name. The checks of archives and of records use this list.

An operator is on the list if it is a functional one of Core ATen or of prims, or if torch.export writes it for real
models. A name without a dot stands for all overloads of this name that take tensors and numbers, return tensors, and
change none of their arguments. A name with a dot is one overload. No operator here reads files or storages, views
another tensor's memory by unchecked sizes and strides, or crashes on random arguments. ``tools/check_operators.py``
shows the last, and which models need operators beyond Core ATen.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import torch

from surgery.errors import UnsafeFileError

__all__ = ["GROUPS", "PLAIN_OPERATORS", "REFUSED_CORE", "Group", "check_operator", "group_of", "overloads"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


@dataclass(frozen=True)
class Group:
    """Operators of one namespace that are allowed for one reason; ``in_place`` ones may change their first argument."""

    reason: str
    names: frozenset[str]
    namespace: str = "aten"
    in_place: bool = False


GROUPS: dict[str, Group] = {
    "core": Group(
        "Core ATen, functional: what any program consists of after decomposition",
        _words("""
            _adaptive_avg_pool2d _adaptive_avg_pool3d _cdist_forward _log_softmax
            _native_batch_norm_legit.no_stats _native_batch_norm_legit_no_training _pdist_forward _softmax _to_copy
            abs acos acosh adaptive_avg_pool1d add addmm alias amax amin any arange argmax argmin as_strided asin
            asinh atan atan2 atanh avg_pool1d avg_pool2d avg_pool3d bitwise_and bitwise_not bitwise_or bitwise_xor bmm
            cat ceil clamp clone col2im constant_pad_nd convolution copy cos cosh cumsum diagonal div elu embedding
            empty empty_strided eq erf exp expand expm1 fill flip floor fmod full full_like gather ge gelu
            grid_sampler_2d gt hardtanh index index_put index_select isinf isnan le leaky_relu log log10 log1p log2
            logical_and logical_not logical_or logical_xor lt masked_scatter max max_pool2d_with_indices
            max_pool3d_with_indices maximum mean min minimum mm mul native_dropout native_group_norm native_layer_norm
            ne neg nonzero permute pow prod rand randn randperm reciprocal reflection_pad1d reflection_pad2d
            reflection_pad3d relu remainder repeat replication_pad2d replication_pad3d round rsqrt scalar_tensor
            scatter scatter_add scatter_reduce select select_scatter sigmoid sign sin sinh slice slice_scatter sort
            split_with_sizes sqrt squeeze sub sum tan tanh topk trunc unsqueeze upsample_bilinear2d upsample_nearest2d
            var view where
        """),
    ),
    "sizes": Group(
        "sizes, numbers out of tensors and checks of them: torch.export writes them for dynamic shapes",
        _words("""
            sym_size.int sym_stride.int sym_numel.default sym_storage_offset.default sym_is_contiguous.default
            item.default _local_scalar_dense.default _assert_scalar.default _assert_async.default _assert_async.msg
            _assert_tensor_metadata.default sym_constrain_range.default sym_constrain_range_for_size.default
        """),
    ),
    "prims": Group(
        "prims, functional: what decompositions write; not div: the least whole number divided by -1 ends the process",
        _words("""
            abs acos acosh add amax amin asin asinh atan atan2 atanh bessel_i0 bessel_i0e bessel_i1 bessel_i1e
            bessel_j0 bessel_j1 bitwise_and bitwise_not bitwise_or bitwise_xor broadcast_in_dim cat cbrt ceil clone
            collapse conj conj_physical convert_element_type cos cosh digamma eq erf erf_inv erfc erfcx exp exp2
            expm1 fill floor fmax fmin fmod frexp full full_like gcd ge gt hypot igamma igammac imag iota isfinite le
            lgamma log log10 log1p log2 lt maximum minimum mul ndtri ne neg nextafter pow prod real reciprocal
            remainder reshape rev round rsqrt scalar_tensor shift_left shift_right_arithmetic sign signbit sin sinh
            spherical_bessel_j0 split_dim sqrt squeeze sub sum tan tanh transpose trunc var where xor_sum zeta
        """),
        namespace="prims",
    ),
    "layers": Group(
        "layers of torch.nn, which torch.export writes as one operator",
        _words("""
            conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear bilinear batch_norm
            layer_norm group_norm instance_norm rms_norm _fused_rms_norm _weight_norm _weight_norm_interface dropout
            feature_dropout alpha_dropout feature_alpha_dropout lstm.input gru.input rnn_tanh.input
            rnn_relu.input lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell scaled_dot_product_attention
        """),
    ),
    "decomposed": Group(
        "operators that run_decompositions() leaves of layers, although they are not Core ATen",
        _words("""
            _native_batch_norm_legit_functional _trilinear rrelu_with_noise_functional _fft_r2c _fft_c2r _fft_c2c
            _linalg_svd _linalg_eigh _linalg_det _linalg_slogdet _linalg_solve_ex linalg_inv_ex linalg_cholesky_ex
            linalg_lu_factor_ex _linalg_check_errors.default
        """),
    ),
    "activations": Group(
        "activations of torch.nn",
        _words("""
            celu glu hardshrink hardsigmoid hardswish log_sigmoid log_softmax logit mish prelu relu6 rrelu selu silu
            softmax softplus softshrink threshold
        """),
    ),
    "pooling": Group(
        "pooling, padding and interpolation of torch.nn",
        _words("""
            adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
            max_pool1d max_pool1d_with_indices max_pool2d max_pool3d max_unpool2d max_unpool3d pad replication_pad1d
            upsample_bicubic2d upsample_linear1d upsample_nearest1d upsample_nearest3d upsample_trilinear3d
            _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d _upsample_bilinear2d_aa
            _upsample_bicubic2d_aa affine_grid_generator grid_sampler grid_sampler_3d im2col pixel_shuffle
            pixel_unshuffle channel_shuffle native_channel_shuffle fractional_max_pool2d fractional_max_pool3d
        """),
    ),
    "shapes": Group(
        "views, shapes and kinds of tensors, which Core ATen expresses by other operators",
        _words("""
            mT mH matrix_H adjoint
            atleast_1d atleast_2d atleast_3d block_diag broadcast_tensors broadcast_to chunk column_stack concat
            concatenate contiguous detach expand_as flatten fliplr flipud hstack lift lift_fresh lift_fresh_copy
            meshgrid moveaxis movedim narrow numpy_T ravel repeat_interleave reshape reshape_as resolve_conj
            resolve_neg roll rot90 row_stack split stack swapaxes swapdims t tensor_split tile to.device to.dtype
            to.dtype_layout to.other transpose type_as unbind unflatten unfold view_as vstack diag diag_embed
            diagonal_scatter view_as_complex view_as_real real imag conj conj_physical _conj complex polar angle
            permute_copy view_copy unfold_copy expand_copy squeeze_copy unsqueeze_copy select_copy slice_copy
            transpose_copy t_copy detach_copy alias_copy diagonal_copy split_copy split_with_sizes_copy unbind_copy
            view_as_real_copy view_as_complex_copy diagflat dstack hsplit vsplit dsplit vander cartesian_prod
        """),
    ),
    "arithmetic": Group(
        "elementwise arithmetic, which Core ATen expresses by other operators",
        _words("""
            absolute addcdiv addcmul arccos arccosh arcsin arcsinh arctan arctan2 arctanh bitwise_left_shift
            bitwise_right_shift clamp_max clamp_min clip divide erfc erfinv exp2 fix float_power floor_divide fmax
            fmin frac greater greater_equal isclose isfinite isreal lerp less less_equal masked_fill multiply
            nan_to_num negative not_equal positive rsub sgn signbit square subtract true_divide __and__ __or__ __xor__
            __lshift__ __rshift__ lgamma digamma polygamma mvlgamma xlogy logaddexp logaddexp2 hypot copysign
            heaviside ldexp gcd lcm nextafter sinc i0 deg2rad rad2deg isposinf isneginf special_expit special_entr
            special_log_ndtr special_ndtr special_ndtri special_erfcx special_zeta special_i0e special_i1 special_i1e
            special_gammainc special_gammaincc special_gammaln special_digamma special_polygamma special_xlog1py
            special_xlogy special_bessel_j0 special_bessel_j1 special_logit special_sinc special_round
        """),
    ),
    "reductions": Group(
        "sums, orders and statistics, which Core ATen expresses by other operators",
        _words("""
            all aminmax argsort argwhere bucketize count_nonzero cummax cummin cumprod diff isin linalg_norm
            linalg_vector_norm logcumsumexp logsumexp median msort nanmean nansum norm quantile searchsorted std
            std_mean sum_to_size unique_consecutive unique_dim _unique2 var_mean cosine_similarity pairwise_distance
            cdist pdist kthvalue mode nanmedian nanquantile trace histc gradient trapezoid cumulative_trapezoid renorm
            special_logsumexp special_softmax special_log_softmax
        """),
    ),
    "products": Group(
        "products of matrices, transforms and solvers",
        _words("""
            addbmm addmv baddbmm cross dot einsum inner kron linalg_cross linalg_inv linalg_matmul linalg_solve matmul
            matrix_exp mv outer tensordot tril triu vdot fft_fft fft_fft2 fft_fftn fft_fftshift fft_ifft fft_ifft2
            fft_ifftn fft_ifftshift fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn fft_hfft fft_hfft2
            fft_hfftn fft_ihfft fft_ihfft2 fft_ihfftn fft_fftfreq fft_rfftfreq stft istft addr chain_matmul
            linalg_svd linalg_svdvals linalg_qr linalg_cholesky linalg_eig linalg_eigvals linalg_eigh linalg_eigvalsh
            linalg_det linalg_slogdet linalg_lu linalg_lu_factor linalg_pinv linalg_solve_triangular linalg_multi_dot
            linalg_matrix_norm linalg_matrix_power linalg_matrix_exp linalg_vecdot linalg_vander det slogdet logdet
            inverse pinverse cholesky cholesky_solve cholesky_inverse
        """),
    ),
    "creation": Group(
        "new tensors and random numbers",
        _words("""
            bernoulli empty_like empty_permuted eye hamming_window hann_window linspace multinomial new_empty
            new_empty_strided new_full new_ones new_zeros one_hot ones ones_like rand_like randint randint_like
            randn_like tril_indices triu_indices zero zeros zeros_like logspace bartlett_window blackman_window
            kaiser_window normal poisson
        """),
    ),
    "indexing": Group(
        "reads and writes by index, which torch checks against the size",
        _words("""
            index_add index_copy index_fill index_reduce masked_select nonzero_numpy put take take_along_dim
        """),
    ),
    "unsafe in name": Group(
        "unsafe only for in-place gradients: both check memory as view and index do, and exports hold them",
        _words("_unsafe_view _unsafe_index"),
    ),
    "losses": Group(
        "losses, in models that are called with labels",
        _words("""
            binary_cross_entropy binary_cross_entropy_with_logits cross_entropy_loss huber_loss kl_div l1_loss
            mse_loss nll_loss nll_loss2d nll_loss2d_forward nll_loss_forward nll_loss_nd smooth_l1_loss
            cosine_embedding_loss hinge_embedding_loss margin_ranking_loss multi_margin_loss multilabel_margin_loss
            poisson_nll_loss soft_margin_loss triplet_margin_loss
        """),
    ),
    "in place": Group(
        "inplace=True of layers, += on tensors, writes to slices, counters of batches: torch.export keeps them",
        _words("""
            add_ bernoulli_ bitwise_and_ bitwise_or_ bitwise_xor_ clamp_ clamp_max_ clamp_min_ clip_ copy_ detach_
            div_ dropout_ elu_ exp_ fill_ fill_diagonal_ floor_divide_ gelu_ hardsigmoid_ hardswish_ hardtanh_
            index_add_ index_copy_ index_fill_ index_put_ leaky_relu_ log_ logical_not_ masked_fill_ masked_scatter_
            mul_ neg_ normal_ pow_ reciprocal_ relu_ relu6_ remainder_ rsqrt_ scatter_ scatter_add_ scatter_reduce_
            selu_ sigmoid_ silu_ sqrt_ square_ sub_ tanh_ tril_ triu_ uniform_ zero_ celu_ mish_ threshold_ rrelu_
            feature_dropout_ __iand__ __ior__ __ixor__ sin_ cos_ abs_ sign_ floor_ ceil_ round_ trunc_ cumsum_
            cumprod_ fmod_ lerp_ addcmul_ addcdiv_ addmm_ addmv_ baddbmm_ logical_and_ logical_or_ logical_xor_ erf_
            expm1_ log1p_ log2_ sinh_ cosh_ tan_ atan_ squeeze_ unsqueeze_ t_ transpose_ exponential_ nan_to_num_
            index_reduce_ embedding_renorm_
        """),
        in_place=True,
    ),
    "quantized": Group(
        "quantization as plain arithmetic, which the quantizers of torchao write",
        _words("""
            choose_qparams choose_qparams_symmetric choose_qparams_per_token choose_qparams_per_token_asymmetric
            quantize_per_tensor dequantize_per_tensor quantize_per_channel dequantize_per_channel quantize_per_token
            dequantize_per_token
        """),
        namespace="quantized_decomposed",
    ),
}

# functional operators of Core ATen that are not on the list, with the reason
REFUSED_CORE: dict[str, str] = {
    "_embedding_bag": "reads before its indices if an offset is negative, and past them if it has no offsets",
}

# targets outside torch.ops that torch.export writes
PLAIN_OPERATORS = frozenset(
    [f"_operator.{name}" for name in _words("eq ne le ge lt gt neg pos mul add sub floordiv mod pow truediv")]
    + [f"_operator.{name}" for name in ("and_", "or_", "lshift", "rshift", "getitem")]
    + [f"math.{name}" for name in ("trunc", "floor", "ceil", "sqrt")]
    + [f"torch.sym_{name}" for name in ("not", "int", "float", "ite", "max", "min", "sqrt", "sum")]
    + ["torch._sym_sqrt"]
)
_HIGHER_ORDER = _words(
    "cond while_loop scan associative_scan map_impl map wrap_with_set_grad_enabled wrap_with_autocast "
    "invoke_subgraph strict_mode out_dtype flex_attention hints_wrapper wrap tag_activation_checkpoint"
)

_OVERLOAD = re.compile(r"torch\.ops\.([a-z]\w*)\.(\w+)\.(\w+)", re.ASCII)
_PLAIN_ARGUMENTS = _words(
    "TensorType IntType FloatType BoolType ComplexType NumberType StringType DeviceObjType GeneratorType"
)
_BY_NAME = re.compile(r"names|dimname", re.IGNORECASE)  # overloads with named dimensions, which are never exported
_ALLOWED = "operators known to be safe (surgery/files/guard/operators.py); open an issue if you need this one"


@functools.cache
def _index() -> dict[tuple[str, str], str]:
    """Return the group of each listed name: (namespace, name) -> group."""
    return {(group.namespace, name): label for label, group in GROUPS.items() for name in group.names}


def _kind(argument: torch._C.Argument) -> str:
    kind = argument.type
    while kind.kind() in ("OptionalType", "ListType"):
        kind = kind.getElementType()
    return kind.kind()


def _form_fault(schema: torch._C.FunctionSchema, *, in_place: bool) -> str | None:
    """Return why a name without a dot does not cover an overload of this form, or None."""
    # An overload that writes may write to its first argument only, and only in a group of in-place operators.
    written = [number for number, each in enumerate(schema.arguments) if each.alias_info and each.alias_info.is_write]
    if written != ([0] if in_place else []):
        return "which writes to its arguments"
    if not {_kind(each) for each in schema.arguments} <= _PLAIN_ARGUMENTS:
        return "which takes objects"
    if not schema.returns or any(_kind(each) != "TensorType" for each in schema.returns):
        return "which returns no tensors"
    return "whose dimensions have names" if _BY_NAME.search(schema.overload_name) else None


def _schemas(namespace: str, name: str) -> dict[str, torch._C.FunctionSchema]:
    """Return the overloads of an operator that torch's dispatcher has, without TorchScript's own. Calls nothing."""
    found = torch._C._jit_get_schemas_for_operator(f"{namespace}::{name}")
    return {each.overload_name or "default": each for each in found if _is_dispatched(each)}


def _is_dispatched(schema: torch._C.FunctionSchema) -> bool:
    try:
        torch._C._dispatch_find_schema_or_throw(schema.name, schema.overload_name)
    except RuntimeError:
        return False
    return True


@functools.cache
def _overload_fault(namespace: str, name: str, overload: str) -> str | None:
    """Return why a program may not call this overload, or None."""
    # A name with an overload is listed exactly; a bare name stands for all overloads of the right form.
    index = _index()
    label = index.get((namespace, f"{name}.{overload}"))
    whole = index.get((namespace, name))
    if label is None and whole is None:
        return "which is not on the list"
    schema = _schemas(namespace, name).get(overload)
    if schema is None:
        return "which is not registered in this torch"
    return _form_fault(schema, in_place=GROUPS[whole].in_place) if label is None and whole else None


def group_of(target: str) -> str | None:
    """Return the name of the group that allows an overload, such as ``torch.ops.aten.relu.default``, or None."""
    match = _OVERLOAD.fullmatch(target)
    if match is None or _overload_fault(*match.groups()):
        return None
    namespace, name, overload = match.groups()
    return _index().get((namespace, f"{name}.{overload}")) or _index()[namespace, name]


def overloads() -> list[str]:
    """Return all overloads of torch.ops that are allowed and registered in this torch, without higher-order ones."""
    found = []
    for group in GROUPS.values():
        for name in sorted(group.names):
            packet, _, only = name.partition(".")
            all_of_it = [only] if only else sorted(_schemas(group.namespace, packet))
            found += [f"torch.ops.{group.namespace}.{packet}.{each}" for each in all_of_it]
    return [target for target in dict.fromkeys(found) if group_of(target)]


def check_operator(target: str) -> None:
    """Raise UnsafeFileError unless a program may call this target."""
    if target in PLAIN_OPERATORS:
        return
    if target.removeprefix("torch.ops.higher_order.") in _HIGHER_ORDER:
        return
    match = _OVERLOAD.fullmatch(target)
    if match is None:
        raise UnsafeFileError(f"it calls {target[:80]!r}", allowed=_ALLOWED)
    if fault := _overload_fault(*match.groups()):
        raise UnsafeFileError(f"it calls {target[:80]!r}, {fault}", allowed=_ALLOWED)
