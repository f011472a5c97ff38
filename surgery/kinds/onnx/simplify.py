"""Simplify what torch exports: constants are folded, and nodes that do nothing go; layers stay what they are.

These are the passes of ``torch.onnx``, but for those that change layers: a batch norm or a padding stays a node, and a
bias of zeros stays. Runtimes merge them when they load a model, and a layer must stay the one that is factored.

Some rules are younger than the oldest onnxscript that is allowed; without them the file has a few nodes more.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

__all__ = ["fold_all", "simplify"]

_RULES = (
    *("mul_by_1_rule", "add_0_rule", "sub_0_rule", "div_by_1_rule", "dropout_zero_rule", "dropout_inference_rule"),
    *("two_reshapes_matmul_reshape_rule", "one_reshape_matmul_reshape_rule"),
    *("cast_constant_of_shape_rule", "cast_constant_of_shape_without_value_rule"),
    *("collapse_slice_rule", "collapse_slice2_rule", "materialize_reshape_shape_rule"),
    *("min_min_rule", "max_max_rule", "min_max_rule", "max_min_rule"),
    *("successive_clip_relu_rule", "successive_relu_clip_rule", "successive_relu_rule", "successive_clip_rule"),
    *("cast_cast_rule", "no_op_cast_rule", "no_op_expand_rule", "flatten_to_reshape_rule", "reshape_reshape_rule"),
    *("slice_split_rule", "no_op_transpose_rule", "transpose_transpose_rule", "unsqueeze_unsqueeze_rule"),
    *("squeeze_reshape_1d_rule", "no_op_dynamic_scatter_nd_rule", "no_op_static_scatter_nd_rule"),
)
_ROUNDS = 2  # folding shows what rules can rewrite, and the other way round
_ANY_SIZE = 2**40


def simplify(model: ir.Model, between: Callable[[], None] = lambda: None) -> None:
    """Simplify a model in its place; ``between`` runs after each time that constants were folded."""
    import onnx_ir.passes.common as common
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    chosen = rewriter.RewritePass([getattr(rules, name) for name in _RULES if hasattr(rules, name)])
    tidy = ("RemoveUnusedNodesPass", "RemoveUnusedFunctionsPass", "RemoveUnusedOpsetsPass")
    common.InlinePass()(model)
    for _ in range(_ROUNDS):
        optimizer.fold_constants_ir(model, onnx_shape_inference=True)
        between()
        for each in (chosen, *(getattr(common, name)() for name in tidy)):
            each(model)
    for last in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        last(model)


def fold_all(model: ir.Model, nodes: set[ir.Node]) -> None:
    """Fold these nodes if they read constants, however large these are; no others."""
    from onnxscript import optimizer

    optimizer.fold_constants_ir(
        model, input_size_limit=_ANY_SIZE, output_size_limit=_ANY_SIZE, should_fold=lambda node: node in nodes
    )
