"""A model as nodes in program order, with a symbolic batch (torch.export)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from sympy import Expr
from torch import Tensor, fx, nn
from torch.export import Dim

from ee_surgery.backbone import Backbone, eval_mode
from ee_surgery.errors import CaptureError

_PREFIX = "model."  # of the wrapper below, in front of every name that export reports


class _LogitsOnly(nn.Module):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.model = backbone.model
        self._read: Callable[[Tensor], Tensor] = lambda x: backbone.logits(backbone.call(x))

    def forward(self, x: Tensor) -> Tensor:
        return self._read(x)


@dataclass(frozen=True, eq=False)
class Capture:
    """One program: what `model(x)` computes for inputs of one shape, dtype and device, at any batch size."""

    nodes: list[fx.Node]
    """Every call, in program order."""
    position: dict[fx.Node, int]
    """Index of each call in `nodes`."""
    input: fx.Node
    output: fx.Node
    """The node whose value is the logits."""
    batch: Expr
    """The symbol of the batch size."""
    tensors: dict[fx.Node, str]
    """Parameter and buffer placeholders, by their name in the model."""
    constants: dict[fx.Node, object]
    """Values the graph carries itself: lifted tensors, submodules of higher-order ops."""
    owners: dict[fx.Node, list[str]] = field(default_factory=dict)
    """Module paths around each call, outermost first; a module called again gets the suffix @1, @2."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample, without the batch."""
        return tuple(int(size) for size in self.input.meta["val"].shape[1:])


def capture(backbone: Backbone, sample: Tensor | None = None) -> Capture:
    """Read `backbone` as a graph whose batch is a symbol; the model's training flags are given back.

    Args:
        sample: a batch of the size, dtype and device to capture for, shape (B, ...) with B >= 2;
            the backbone's own sample when left out.
    Raises:
        CaptureError: the model cannot be exported, or only for one batch size.
    """
    sample = backbone.sample if sample is None else sample
    wrapper = _LogitsOnly(backbone)
    with eval_mode([*wrapper.modules()]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # export warns about its own deprecated internals
        try:
            program = torch.export.export(wrapper, (sample,), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False)
        except Exception as error:
            raise CaptureError(_explain(backbone, error)) from error
    return _read(program)


def _explain(backbone: Backbone, error: Exception) -> str:
    inside = [frame.f_locals.get("self") for frame in _frames(error)]
    names = {id(module): name for name, module in backbone.model.named_modules() if name}
    where = [names[id(module)] for module in inside if id(module) in names]
    place = f" in module {where[-1]!r}" if where else ""
    first = (str(error).strip().splitlines() or [""])[0]
    hint = (
        "Its forward fixes the batch size; pass a sample of another size, or replace the Python code that reads it."
        if "Dim" in first or "specializ" in str(error)
        else "Replace data-dependent Python control flow there, or wrap the model in a module without it."
    )
    return (
        f"{backbone.model_id} cannot be captured by torch.export{place}: {type(error).__name__}: {first[:300]} {hint}"
    )


def _frames(error: BaseException):
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _read(program: torch.export.ExportedProgram) -> Capture:
    graph, signature = program.graph, program.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    _drop_dropout(graph)
    tensors: dict[fx.Node, str] = {}
    constants: dict[fx.Node, object] = {}
    inputs: list[fx.Node] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.name in named:
                tensors[node] = named[node.name].removeprefix(_PREFIX)
            elif node.name in lifted:
                constants[node] = program.constants[lifted[node.name]]
            else:
                inputs.append(node)
        elif node.op == "get_attr":
            constants[node] = program.graph_module.get_submodule(str(node.target))
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    (output,) = (node for node in graph.nodes if node.op == "output")
    (result,) = output.args[0]
    (source,) = inputs
    return Capture(
        nodes=nodes,
        position={node: i for i, node in enumerate(nodes)},
        input=source,
        output=result,
        batch=source.meta["val"].shape[0].node.expr,
        tensors=tensors,
        constants=constants,
        owners={node: _owners(node) for node in nodes},
    )


def _drop_dropout(graph: fx.Graph) -> None:
    aten = torch.ops.aten
    for node in list(graph.nodes):
        if node.target in (aten.dropout.default, aten.feature_dropout.default) and node.args[2] is False:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _owners(node: fx.Node) -> list[str]:
    stack = node.meta.get("nn_module_stack") or {}
    owners = []
    for key, (path, _) in stack.items():
        if path.startswith(_PREFIX):
            call = key.partition("@")[2]
            owners.append(path.removeprefix(_PREFIX) + (f"@{call}" if call else ""))
    return owners
