"""Multiply-accumulate operations (MACs) of every call, from its shapes.

One multiply-add is one MAC. Convolutions, linear layers, matrix products, einsum and scaled dot-product attention
count; element-wise calls, normalization, pooling, interpolation and data movement are free, as is usual.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from sympy import Expr
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from ee_surgery.backbone.twin import twin
from ee_surgery.graph.capture import Capture
from ee_surgery.graph.nodes import op_name
from ee_surgery.graph.opaque import is_opaque

_Shape = tuple[int, ...]
_Formula = Callable[[fx.Node, list[_Shape], _Shape], int]


def _conv(node: fx.Node, inputs: list[_Shape], out: _Shape) -> int:
    # weight (C_out, C_in / groups, *kernel): each output element is one row of it
    return math.prod(out) * math.prod(inputs[1][1:])


def _conv_transpose(node: fx.Node, inputs: list[_Shape], out: _Shape) -> int:
    # weight (C_in, C_out / groups, *kernel): each input element is spread over one row of it
    return math.prod(inputs[0]) * math.prod(inputs[1][1:])


def _convolution(node: fx.Node, inputs: list[_Shape], out: _Shape) -> int:
    return (_conv_transpose if node.args[6] else _conv)(node, inputs, out)


def _linear(node: fx.Node, inputs: list[_Shape], out: _Shape) -> int:
    return math.prod(out) * inputs[0][-1]


def _addmm(node: fx.Node, inputs: list[_Shape], out: _Shape) -> int:
    return math.prod(out) * inputs[1][-1]


def _attention(node: fx.Node, inputs: list[_Shape], out: _Shape) -> int:
    query, key = inputs[0], inputs[1]
    # query x key, then weights x value
    return math.prod(query) * key[-2] + math.prod(out) * key[-2]


def _recurrent(node: fx.Node, inputs: list[_Shape], out: _Shape) -> int:
    # each step of each sequence multiplies by all matrices of all layers and directions
    return math.prod(inputs[0][:-1]) * sum(math.prod(shape) for shape in inputs[1:] if len(shape) == 2)


def _einsum(node: fx.Node, inputs: list[_Shape], out: _Shape) -> int:
    equation = str(node.args[0]).replace(" ", "")
    if "..." in equation or "->" not in equation:
        raise NotImplementedError(equation)
    left, result = equation.split("->")
    terms = left.split(",")
    sizes = {letter: size for term, shape in zip(terms, inputs, strict=True) for letter, size in zip(term, shape)}  # noqa: B905
    total, have = 0, set(terms[0])
    for i, term in enumerate(terms[1:], start=1):  # pairwise from the left, as torch does without opt_einsum
        later = set(result).union(*terms[i + 1 :])
        # an index in only one operand and in no later one is summed before the product
        have = {letter for letter in have if letter in later or letter in term}
        mine = {letter for letter in term if letter in later or letter in have}
        total += math.prod(sizes[letter] for letter in have | mine)
        have = (have | mine) & later
    return total


_FORMULAS: dict[str, _Formula] = {
    **{f"conv{d}d": _conv for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": _conv_transpose for d in (1, 2, 3)},
    "convolution": _convolution,
    "_convolution": _convolution,
    "linear": _linear,
    "matmul": _linear,  # (..., n, k) x (..., k, m)
    "mm": _linear,
    "bmm": _linear,
    "mv": _linear,
    "dot": lambda node, inputs, out: inputs[0][0],
    "addmm": _addmm,
    "baddbmm": _addmm,
    "addbmm": _addmm,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
}

# Calls without a pointwise tag that move, normalize, pool or reduce: negligible multiply-adds.
_FREE = frozenset(
    """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d avg_pool1d avg_pool2d
    avg_pool3d max_pool1d max_pool2d max_pool2d_with_indices mean sum amax amin max min argmax argmin std var
    var_mean cumsum batch_norm layer_norm group_norm instance_norm rms_norm softmax log_softmax _softmax norm
    linalg_vector_norm normalize_ cat stack roll flip pad constant_pad_nd reflection_pad2d replication_pad2d index
    index_select gather embedding one_hot repeat repeat_interleave tile arange zeros ones full empty zeros_like
    ones_like full_like empty_like linspace scalar_tensor new_zeros new_ones new_full new_empty tril triu meshgrid
    clone copy_ contiguous to _to_copy type_as reshape flatten unflatten dropout feature_dropout pixel_shuffle
    pixel_unshuffle channel_shuffle fill_ masked_fill_ index_put_ index_put scatter unfold im2col
    max_unpool2d upsample_nearest2d _upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    sym_size glu prelu celu_ hardswish_ silu_ gelu_ lift_fresh_copy detach_ sort topk getitem
    _assert_tensor_metadata cosine_similarity all any eye randn rand bernoulli bernoulli_ eq ne
    hardswish hardsigmoid hardtanh col2im upsample_linear1d
    """.split()
)


def _concrete(value: object, batch: Expr) -> _Shape | None:
    if not isinstance(value, Tensor):
        return None
    return tuple(int(str(s.node.expr.subs(batch, 1))) if isinstance(s, torch.SymInt) else int(s) for s in value.shape)


def node_macs(node: fx.Node, batch: Expr) -> int | None:
    """MACs of one call for one sample; None if the call may do work but has no formula."""
    name = op_name(node)
    formula = _FORMULAS.get(name)
    if formula is not None:
        shapes = [_concrete(arg.meta.get("val"), batch) for arg in _operands(node)]
        out = () if formula is _recurrent else _concrete(node.meta.get("val"), batch)
        if out is None or any(shape is None for shape in shapes):
            return None
        try:
            return formula(node, [shape for shape in shapes if shape is not None], out)
        except NotImplementedError:
            return None
    bodies = [arg for arg in node.all_input_nodes if arg.op == "get_attr"]
    if bodies:  # a higher-order op (autocast or no_grad region): its body counts
        counted = [_body_macs(body, batch) for body in bodies]
        return None if any(macs is None for macs in counted) else sum(macs for macs in counted if macs is not None)
    return 0 if name in _FREE or (name.endswith("_") and name[:-1] in _FREE) or _is_light(node) else None


def _operands(node: fx.Node) -> list[fx.Node]:
    flat: list[fx.Node] = []
    for arg in node.args:
        flat.extend(a for a in (arg if isinstance(arg, (list, tuple)) else (arg,)) if isinstance(a, fx.Node))
    return [arg for arg in flat if isinstance(arg.meta.get("val"), Tensor)]


def _body_macs(body: fx.Node, batch: Expr) -> int | None:
    owner = body.graph.owning_module
    module = owner.get_submodule(str(body.target)) if owner is not None else None
    if not isinstance(module, fx.GraphModule):
        return None
    counted = [node_macs(node, batch) for node in module.graph.nodes if node.op == "call_function"]
    return None if any(macs is None for macs in counted) else sum(macs for macs in counted if macs is not None)


def _is_light(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return True  # Python arithmetic on sizes
    is_view = any(r.alias_info is not None for r in target._schema.returns)
    # relu_, add_: pointwise under another name
    base = getattr(torch.ops.aten, target._schema.name.split("::")[-1].rstrip("_"), None)
    overload = getattr(base, target._overloadname or "default", target) if base is not None else target
    return is_view or torch.Tag.pointwise in target.tags or torch.Tag.pointwise in overload.tags


def count(capture: Capture, needed: set[fx.Node]) -> tuple[list[int], Counter[str]]:
    """MACs of each call for one sample (0 if the logits do not need it), and the calls without a formula."""
    macs, uncounted = [], Counter[str]()
    for node in capture.nodes:
        if node not in needed:
            value = 0
        elif is_opaque(node):
            value = capture.opaque.macs(node)
        else:
            value = node_macs(node, capture.batch)
        if value is None:
            uncounted[op_name(node)] += 1
        macs.append(value or 0)
    return macs, uncounted


def module_macs(module: nn.Module, *shapes: Sequence[int]) -> int:
    """MACs of a module for one sample, inputs of these shapes (no batch), counted by torch on the meta device."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        inputs = tuple(torch.empty(1, *shape, dtype=dtype, device="meta") for shape in shapes)
        torch.func.functional_call(twin(module), meta, inputs)
    return counter.get_total_flops() // 2
