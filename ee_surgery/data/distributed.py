"""Data-parallel training: shard each batch over processes and reduce over the whole batch.

Everything that is computed over a batch (losses, BatchNorm statistics, accuracies) is computed over the global batch.
So training on N processes equals training on one, except for the order in which floats are summed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Sampler

from ee_surgery.backbone.inputs import Inputs, take
from ee_surgery.data.batches import count, unpack
from ee_surgery.errors import ConfigError, DataError, TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
_SPLIT_MODELS = ("FSDP", "DEEPSPEED", "MEGATRON_LM")  # accelerate's names of what splits a model up


class Shard(NamedTuple):
    """The part of a batch that one process runs."""

    inputs: Inputs
    labels: Tensor | None
    total: int
    """Samples of the global batch, in all processes."""
    own: int
    """How many of the samples here count; the rest is padding, since every process needs a shard of equal size."""


class Processes:
    """The processes of an accelerator; without one, this process alone.

    A batch is split into shards of equal size, in order. If it does not divide evenly, the last shards are padded with
    its first sample, which is not counted.

    Raises:
        ConfigError: several processes were started but the accelerator sees only one, or they shard the model.
    """

    def __init__(self, accelerator: Accelerator | None) -> None:
        self.number = 1 if accelerator is None else accelerator.num_processes
        self.index = 0 if accelerator is None else accelerator.process_index
        self.main = self.index == 0
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if accelerator is not None and self.number == 1 < started:
            raise ConfigError(
                f"{started} processes were started, but Accelerate sees one device and would let each train alone. "
                "On CPUs, start them with ACCELERATE_USE_CPU=true."
            )
        if accelerator is not None and accelerator.distributed_type.name in _SPLIT_MODELS:
            raise ConfigError(
                f"{accelerator.distributed_type.value} shards the model, but exits need it whole. Launch with plain "
                "data parallelism (`accelerate launch --multi_gpu`): branches are small, the original has no gradients."
            )

    def of_main(self, make: Callable[[], T]) -> T:
        """Call `make` in the main process and broadcast the result."""
        made = [make() if self.main else None]
        if self.number > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(made)
        return made[0]  # pyright: ignore[reportReturnType]

    def of_each(self, value: T) -> list[T]:
        """The values of all processes, in order."""
        if self.number == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.number == 1:
            return x
        from accelerate.utils import reduce

        return reduce(x, "sum")  # pyright: ignore[reportReturnType]

    def rows(self, x: Tensor, total: int) -> Tensor:
        """Gather the rows of a batch from all processes, in order: (own, *F) -> (total, *F).

        Gradients flow only into this process's rows, so that summing over processes gives the whole (`add_up`).
        """
        if self.number == 1:
            return x
        pieces = list(_gathered(x.detach()).split(len(x)))  # equal sizes: shards are padded
        if x.requires_grad:
            pieces[self.index] = x
        return torch.cat(pieces)[:total]

    def add_up(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of every parameter over all processes."""
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.number == 1 or not grads:
            return
        # one flat tensor: a single all-reduce
        whole = self.total(torch.cat([grad.flatten() for grad in grads]))
        for grad, part in zip(grads, whole.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def agree(self, what: str, value: object) -> None:
        """Check that all processes have the same value.

        Raises:
            TrainingError: they do not.
        """
        values = self.of_each(value)
        for index, other in enumerate(values):
            if other != values[0]:
                raise TrainingError(
                    f"Process {index} has a different {what} from process 0: {other!r}, not {values[0]!r}."
                )

    def piece(self, batch: list[T]) -> list[T]:
        """This process's shard of a batch, padded to equal size."""
        size = math.ceil(len(batch) / self.number)
        filled = batch + batch[:1] * (size * self.number - len(batch))
        return filled[self.index * size : (self.index + 1) * size]

    def own(self, total: int) -> int:
        """How many samples of this process's shard count."""
        size = math.ceil(total / self.number)
        return max(0, min(size, total - self.index * size))


def _gathered(x: Tensor) -> Tensor:
    from accelerate.utils import gather

    return gather(x)  # pyright: ignore[reportReturnType]


def _split_already(batches: Iterable[Any]) -> bool:
    """Whether a loader gives each process samples of its own."""
    from accelerate.data_loader import DataLoaderAdapter

    return isinstance(batches, DataLoaderAdapter) or isinstance(getattr(batches, "sampler", None), DistributedSampler)


class ShardedBatches:
    """Batches sharded over processes. Can be iterated as often as the batches themselves.

    Args:
        labels: maps the labels of a batch with so many samples, see `Labels`; by default labels stay as they are.

    With a Dataset, or a DataLoader over one, each process loads only its own shard, in an order that the main process
    draws. Any other iterable is read by the main process alone, which sends out the shards.

    Raises:
        DataError: the loader is already split over processes.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        processes: Processes,
        labels: Callable[[Tensor, int], Tensor | None] | None = None,
    ) -> None:
        self.processes, self.labels = processes, labels
        if processes.number > 1 and _split_already(batches):
            raise DataError(
                f"This {type(batches).__name__} already gives each process its own samples, and would be split again. "
                "Pass a plain DataLoader, without accelerator.prepare or DistributedSampler."
            )
        self.sampler: _Pieces | None = None
        if type(batches) is DataLoader and not isinstance(batches.dataset, IterableDataset) and batches.batch_sampler:
            self.sampler = _Pieces(batches.batch_sampler, processes)
            batches = _with_sampler(batches, self.sampler)
        self.batches = batches

    @property
    def length(self) -> int | None:
        """The number of batches, if known."""
        try:
            return len(self.batches)  # pyright: ignore[reportArgumentType]
        except TypeError:
            return None

    def __iter__(self) -> Iterator[Shard]:
        if self.sampler is None:
            return self._handed_out()
        self.sampler.draw()  # now, not at the first batch: in between, each process is seeded differently
        return self._loaded(self.sampler.order)

    def _loaded(self, order: list[list[Any]]) -> Iterator[Shard]:
        for whole, batch in zip(order, self.batches, strict=True):
            inputs, labels = self._unpack(batch)
            yield Shard(inputs, labels, len(whole), self.processes.own(len(whole)))

    def _handed_out(self) -> Iterator[Shard]:
        if self.processes.number == 1:
            for batch in self.batches:
                inputs, labels = self._unpack(batch)
                yield Shard(inputs, labels, count(inputs), count(inputs))
            return
        iterator = iter(self.batches) if self.processes.main else iter(())
        while (given := self.processes.of_main(lambda: self._next(iterator))) is not None:
            inputs, labels = given
            total = count(inputs)
            rows = torch.tensor(self.processes.piece(list(range(total))))
            yield Shard(take(inputs, rows), None if labels is None else labels[rows], total, self.processes.own(total))

    def _next(self, iterator: Iterator[Any]) -> tuple[Inputs, Tensor | None] | None:
        """The next batch, on the CPU, or None after the last."""
        for batch in iterator:
            inputs, labels = self._unpack(batch)
            if isinstance(inputs, Tensor):
                inputs = inputs.cpu()
            else:
                inputs = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in inputs.items()}
            return inputs, None if labels is None else labels.cpu()
        return None

    def _unpack(self, batch: Any) -> tuple[Inputs, Tensor | None]:
        inputs, labels = unpack(batch)
        if labels is None or self.labels is None:
            return inputs, labels
        return inputs, self.labels(labels, count(inputs))


class _Pieces(Sampler[list[Any]]):
    """Yields this process's shard of each batch of another sampler."""

    def __init__(self, whole: Iterable[list[Any]], processes: Processes) -> None:
        self.whole, self.processes = whole, processes
        self.order: list[list[Any]] = []

    def draw(self) -> None:
        """Draw the order of one epoch in the main process, and broadcast it."""
        self.order = self.processes.of_main(lambda: [list(batch) for batch in self.whole])

    def __iter__(self) -> Iterator[list[Any]]:
        return (self.processes.piece(batch) for batch in self.order)

    def __len__(self) -> int:
        return len(self.whole)  # pyright: ignore[reportArgumentType]


def _with_sampler(loader: DataLoader[Any], sampler: _Pieces) -> DataLoader[Any]:
    kept = (
        "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator",
        "prefetch_factor", "persistent_workers",
    )  # fmt: skip
    return DataLoader(loader.dataset, batch_sampler=sampler, **{name: getattr(loader, name) for name in kept})


class GlobalBatchNorm(TorchFunctionMode):
    """A mode in which BatchNorms in training use the statistics of the samples of all processes.

    Like `torch.nn.SyncBatchNorm`, but on any device, for any module that calls `batch_norm`, and without padding
    samples.

    A batch of one sample with one value per channel has no variance: the running statistics are used.

    Args:
        own: number of samples here without padding.
        total: number of samples in all processes.
    """

    def __init__(self, processes: Processes, own: int, total: int) -> None:
        super().__init__()
        self.processes, self.own, self.total = processes, own, total

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace `batch_norm` only."""
        if func is F.batch_norm:
            return self._batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        alone = self.total * input[0, 0].numel() == 1 and running_mean is not None
        if not training or alone or self.processes.number == 1:
            statistics = training and not alone
            return F.batch_norm(input, running_mean, running_var, weight, bias, statistics, momentum, eps)
        x = input.float()
        places = [dim for dim in range(x.ndim) if dim != 1]  # reduce over batch and positions
        shape = [-1 if dim == 1 else 1 for dim in range(x.ndim)]
        counted = x[: self.own]
        n = counted.numel() // x.shape[1]
        mean = counted.sum(places) / max(1, n)
        var = (counted - mean.view(shape)).square().sum(places) / max(1, n)
        ns, means, variances = _Each.apply(torch.stack([torch.full_like(mean, n), mean, var]), self.processes).unbind(1)
        total = ns.sum(0)  # (C,), all entries equal: n summed over processes
        mean = (ns * means).sum(0) / total
        # law of total variance over processes; biased, as in training mode
        var = (ns * (variances + (means - mean).square())).sum(0) / total
        with torch.no_grad():
            if running_mean is not None and running_var is not None:
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                running_var.lerp_((var * total / (total - 1).clamp_min(1)).to(running_var.dtype), momentum)
        scale = torch.rsqrt(var + eps) * (1 if weight is None else weight)
        shift = (0 if bias is None else bias) - mean * scale
        return (x * scale.view(shape) + shift.view(shape)).to(input.dtype)


class _Each(torch.autograd.Function):
    """Differentiable all-gather: (*shape) -> (processes, *shape); gradients flow back to all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        return _gathered(x[None])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.processes.total(grad.contiguous())[ctx.processes.index], None
