"""Several processes, one training: who runs which samples, and what all of them make of a batch.

Whatever is computed over a batch (losses, BatchNorm statistics, accuracies) is computed over the batch of all
processes. So training on N processes is training on one, but for the order in which floats are summed.
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
    """What one process runs of a batch."""

    inputs: Inputs
    labels: Tensor | None
    total: int
    """Samples of the whole batch, in all processes."""
    own: int
    """How many of the samples here count; those behind them only fill up, for no process can go without."""


class Processes:
    """The processes of an accelerator; without one, this process alone, whatever the others do.

    A batch is cut into pieces of one size, in order; where it does not divide, its first sample fills up the last
    pieces, and counts nowhere.

    Raises:
        ConfigError: several processes were started, but the accelerator knows only one; or they share out a model.
    """

    def __init__(self, accelerator: Accelerator | None) -> None:
        self.number = 1 if accelerator is None else accelerator.num_processes
        self.index = 0 if accelerator is None else accelerator.process_index
        self.main = self.index == 0
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if accelerator is not None and self.number == 1 < started:
            raise ConfigError(
                f"{started} processes were started, but Accelerate sees one device and would let each train on its "
                "own. On CPUs, start them with ACCELERATE_USE_CPU=true."
            )
        if accelerator is not None and accelerator.distributed_type.name in _SPLIT_MODELS:
            raise ConfigError(
                f"{accelerator.distributed_type.value} splits models up, but exits read whole ones. Launch with plain "
                "data parallelism (`accelerate launch --multi_gpu`): branches are small, the original has no gradients."
            )

    def of_main(self, make: Callable[[], T]) -> T:
        """What the main process makes, for all of them; the others make nothing."""
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
        """The rows that all processes hold of a batch, in its order: (own, *F) to (total, *F).

        Gradients flow into the own rows alone, so that those of all processes add up to the whole (`add_up`).
        """
        if self.number == 1:
            return x
        pieces = list(_gathered(x.detach()).split(len(x)))
        if x.requires_grad:
            pieces[self.index] = x
        return torch.cat(pieces)[:total]

    def add_up(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every parameter the sum of its gradients in all processes."""
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.number == 1 or not grads:
            return
        whole = self.total(torch.cat([grad.flatten() for grad in grads]))
        for grad, part in zip(grads, whole.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def agree(self, what: str, value: object) -> None:
        """Make sure that all processes have the same.

        Raises:
            TrainingError: they do not.
        """
        values = self.of_each(value)
        for index, other in enumerate(values):
            if other != values[0]:
                raise TrainingError(f"Process {index} has another {what} than process 0: {other!r}, not {values[0]!r}.")

    def piece(self, batch: list[T]) -> list[T]:
        """The piece of a batch that this process runs."""
        size = math.ceil(len(batch) / self.number)
        filled = batch + batch[:1] * (size * self.number - len(batch))
        return filled[self.index * size : (self.index + 1) * size]

    def own(self, total: int) -> int:
        """How many samples of its piece count."""
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
    """Batches, of which each process runs its piece. Can be iterated as often as the batches themselves.

    Args:
        labels: what is made of the labels of a batch of so many samples, see `Labels`; nothing when left out.

    Of a Dataset, or a DataLoader over one, each process loads only what it runs, in an order that the main process
    draws. Any other iterable is read by the main process alone, which hands out the pieces.

    Raises:
        DataError: the loader is for one process already.
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
                f"This {type(batches).__name__} gives each process its own samples already, and would be split "
                "again. Hand in a plain DataLoader: without accelerator.prepare, without DistributedSampler."
            )
        self.sampler: _Pieces | None = None
        if type(batches) is DataLoader and not isinstance(batches.dataset, IterableDataset) and batches.batch_sampler:
            self.sampler = _Pieces(batches.batch_sampler, processes)
            batches = _with_sampler(batches, self.sampler)
        self.batches = batches

    @property
    def length(self) -> int | None:
        """How many batches there are, where that is known."""
        try:
            return len(self.batches)  # pyright: ignore[reportArgumentType]
        except TypeError:
            return None

    def __iter__(self) -> Iterator[Shard]:
        if self.sampler is None:
            return self._handed_out()
        self.sampler.draw()  # now, not with the first batch: in between, each process gets its own random numbers
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
        """The next batch, on the CPU, or None behind the last."""
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
    """Of each batch of another sampler, the piece of this process."""

    def __init__(self, whole: Iterable[list[Any]], processes: Processes) -> None:
        self.whole, self.processes = whole, processes
        self.order: list[list[Any]] = []

    def draw(self) -> None:
        """Draw the order of a pass over the data: in the main process, for all."""
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
    """Within this, BatchNorms in training take their statistics from the samples of all processes.

    Like `torch.nn.SyncBatchNorm`, but on any device, for any module that calls `batch_norm`, and without the samples
    that only fill up.

    A batch of one sample with one value per channel has no statistics: it takes those that were kept.

    Args:
        own: how many of the samples here count.
        total: how many samples the batch has in all processes.
    """

    def __init__(self, processes: Processes, own: int, total: int) -> None:
        super().__init__()
        self.processes, self.own, self.total = processes, own, total

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace `batch_norm`, and nothing else."""
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
        places = [dim for dim in range(x.ndim) if dim != 1]
        shape = [-1 if dim == 1 else 1 for dim in range(x.ndim)]
        counted = x[: self.own]
        n = counted.numel() // x.shape[1]
        mean = counted.sum(places) / max(1, n)
        var = (counted - mean.view(shape)).square().sum(places) / max(1, n)
        ns, means, variances = _Each.apply(torch.stack([torch.full_like(mean, n), mean, var]), self.processes).unbind(1)
        total = ns.sum(0)  # (C,), as all of these: the same number, n of all processes
        mean = (ns * means).sum(0) / total
        var = (ns * (variances + (means - mean).square())).sum(0) / total
        with torch.no_grad():
            if running_mean is not None and running_var is not None:
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                running_var.lerp_((var * total / (total - 1).clamp_min(1)).to(running_var.dtype), momentum)
        scale = torch.rsqrt(var + eps) * (1 if weight is None else weight)
        shift = (0 if bias is None else bias) - mean * scale
        return (x * scale.view(shape) + shift.view(shape)).to(input.dtype)


class _Each(torch.autograd.Function):
    """A tensor of every process, (processes, *shape), through which gradients flow back into all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        return _gathered(x[None])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.processes.total(grad.contiguous())[ctx.processes.index], None
