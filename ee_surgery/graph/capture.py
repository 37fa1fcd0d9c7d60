"""Capture a model as nodes in program order, with a symbolic batch (torch.export)."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from sympy import Expr
from torch import Tensor, fx, nn
from torch.export import Dim

from ee_surgery.backbone.base import Backbone, State
from ee_surgery.backbone.inputs import Arguments, Batch, tensors
from ee_surgery.backbone.twin import twin
from ee_surgery.errors import CaptureError
from ee_surgery.graph.capture_errors import explained
from ee_surgery.graph.leftovers import caches_emptied, untie
from ee_surgery.graph.opaque import OpaqueCalls
from ee_surgery.graph.squeezes import name_squeezed_dims

_PREFIX = "surgery_original."  # of the wrapper below, a prefix of most names that export reports


GLOBAL_STATE = threading.RLock()
"""Held while process-wide state is in use: torch.export's patches, transformers' masks, the random generator."""


class _LogitsOnly(nn.Module):
    def __init__(
        self, backbone: Backbone, model: nn.Module, options: Arguments, dims: Mapping[str, int | None]
    ) -> None:
        super().__init__()
        self.surgery_original = model
        if "use_cache" in backbone.input_names:
            options = {"use_cache": False, **options}  # a classifier generates no tokens
        self._read: Callable[[Arguments], Tensor] = lambda given: backbone.logits(
            backbone.call({**given, **options}, model)
        )
        self._dims = dims

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        sizes = [tensor.shape[dim] for n, tensor in inputs.items() if (dim := self._dims.get(n)) is not None]
        for size in sizes[1:]:
            torch._check(size == sizes[0])
        return self._read(inputs)


@dataclass(frozen=True, eq=False)
class Capture:
    """One program: the model's computation for inputs of one shape, dtype and device, at any batch size."""

    state: State
    """State of the backbone at capture."""
    nodes: list[fx.Node]
    """Every call, in program order."""
    position: dict[fx.Node, int]
    """Index of each call in `nodes`."""
    inputs: dict[str, fx.Node]
    """Input tensors by name, the main one first."""
    shared: set[fx.Node]
    """Inputs without a batch dimension, shared by all samples."""
    output: fx.Node
    """The node whose value is the logits."""
    batch: Expr
    """The symbol of the batch size."""
    tensors: dict[fx.Node, str]
    """Parameter and buffer placeholders, by their name in the model."""
    constants: dict[fx.Node, object]
    """Values stored in the graph: lifted tensors, submodules of higher-order ops."""
    opaque: OpaqueCalls
    """Calls of modules kept whole."""
    owners: dict[fx.Node, list[str]] = field(default_factory=dict)
    """Module paths of each call, outermost first; repeated calls of a module have the suffix @1, @2."""


def capture(backbone: Backbone, batch: Batch) -> Capture:
    """Capture `backbone` as a graph with a symbolic batch.

    The model itself is not touched: export swaps the tensors of a twin for fake ones while other threads run the model.
    One capture at a time; others wait.

    Args:
        batch: inputs of the size, dtype and device to capture for, with at least two samples.
    Raises:
        CaptureError: the model cannot be exported, or only for one batch size.
    """
    dims, inputs = batch.dims, tensors(batch.arguments)
    options = {name: value for name, value in batch.arguments.items() if name not in inputs}
    dynamic = {name: None if dims[name] is None else {dims[name]: Dim.DYNAMIC} for name in inputs}
    state = backbone.state()
    with GLOBAL_STATE, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # export warns about its own deprecated internals
        model = twin(state.model)
        wrapper = _LogitsOnly(backbone, model, options, dims).eval()
        with explained(backbone, model, batch.arguments):
            opaque = OpaqueCalls.record(backbone, state.model, batch)
            with opaque.patched(model), _indexed_masks(), _backends_kept(), _traced_apart(), caches_emptied():
                program = torch.export.export(wrapper, (inputs,), dynamic_shapes=(dynamic,), strict=False)
    untie(program)
    return _read(program, state, inputs, dims, opaque)


def _backends_kept() -> AbstractContextManager[object]:
    """Prevent torch.export from disabling cuDNN and oneDNN, which it does process-wide.

    Otherwise other threads would use different kernels meanwhile, slower and with different rounding. Export disables
    them to keep backend-specific operators out of decompositions; this capture is not decomposed.
    """
    from torch.export import _trace  # slow to import, and export does it anyway

    name = "_ignore_backend_decomps"  # private to torch, so it may disappear
    return patch.object(_trace, name, nullcontext) if hasattr(_trace, name) else nullcontext()


class _Apart:
    """An object that other threads see as it was, while this one has another of its kind in its place."""

    def __init__(self, shared: object) -> None:
        vars(self).update(_shared=shared, _own=type(shared)(), _thread=threading.get_ident())

    def _seen(self) -> object:
        return self._own if threading.get_ident() == self._thread else self._shared

    def __getattr__(self, name: str) -> Any:
        return getattr(self._seen(), name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._seen(), name, value)


def _traced_apart() -> AbstractContextManager[object]:
    """Keep the tracer of torch.export to this thread.

    torch has it in one place for the process: arithmetic on symbolic sizes in other threads would be traced as well.
    """
    name = "_mode_stack_state_for_pre_dispatch"  # private to torch, so it may disappear
    shared = getattr(torch._ops, name, None)
    return nullcontext() if shared is None else patch.object(torch._ops, name, _Apart(shared))


@contextmanager
def _indexed_masks() -> Iterator[None]:
    """Make transformers create attention masks by indexing instead of vmap, whose traces cannot be run elsewhere.

    Both give the same mask; transformers itself uses indexing if the mask function allows it.
    """
    masking = sys.modules.get("transformers.masking_utils")
    if masking is None or not hasattr(masking, "_non_vmap_expansion_sdpa"):
        yield
        return

    def expansion(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *indices: function(*masking._non_vmap_expansion_sdpa(*indices))

    with (
        patch.object(masking, "_vmap_expansion_sdpa", expansion),
        patch.object(masking, "TransformGetItemToIndex", nullcontext),
    ):
        yield


def _read(
    program: torch.export.ExportedProgram,
    state: State,
    inputs: Mapping[str, Tensor],
    dims: Mapping[str, int | None],
    opaque: OpaqueCalls,
) -> Capture:
    graph, signature = program.graph, program.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    _drop_dropout(graph)
    name_squeezed_dims(graph)
    tensors: dict[fx.Node, str] = {}
    constants: dict[fx.Node, object] = {}
    given: list[fx.Node] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.name in named:
                tensors[node] = named[node.name].removeprefix(_PREFIX)
            elif node.name in lifted:
                constants[node] = program.constants[lifted[node.name]]
            else:
                given.append(node)
        elif node.op == "get_attr":
            constants[node] = program.graph_module.get_submodule(str(node.target))
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    (output,) = (node for node in graph.nodes if node.op == "output")
    (result,) = output.args[0]
    sources = dict(zip(inputs, given, strict=True))
    main, dim = next((sources[name], dim) for name in inputs if (dim := dims[name]) is not None)
    batch = main.meta["val"].shape[dim]
    if not isinstance(batch, torch.SymInt):
        raise CaptureError(f"The model was captured only for a batch of {batch}: its code fixes the batch size.")
    return Capture(
        state=state,
        nodes=nodes,
        position={node: i for i, node in enumerate(nodes)},
        inputs=sources,
        shared={sources[name] for name in inputs if dims[name] is None},
        output=result,
        batch=batch.node.expr,  # pyright: ignore[reportArgumentType]
        tensors=tensors,
        constants=constants,
        opaque=opaque,
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
        if path not in ("", _PREFIX[:-1]):
            call = key.partition("@")[2]
            owners.append(path.removeprefix(_PREFIX) + (f"@{call}" if call else ""))
    return owners
