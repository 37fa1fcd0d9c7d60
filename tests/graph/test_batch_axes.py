"""Batch axes: samples can be taken out of a tensor and put together again, folded or not."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ee_surgery.graph.batch_axes import Axis

rows = st.lists(st.integers(0, 4), min_size=1, max_size=6)


@given(
    dim=st.integers(0, 2),
    before=st.integers(1, 3),
    after=st.integers(1, 3),
    channels_last=st.booleans(),
    a=rows,
    b=rows,
)
def test_concat_of_two_selections_is_the_selection_of_both(
    dim: int, before: int, after: int, channels_last: bool, a: list[int], b: list[int]
) -> None:
    axis, shape = Axis(dim, before, after), [2, 3, 2, 3]
    shape[dim] = before * 5 * after
    x = torch.arange(torch.Size(shape).numel()).view(shape)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    parts = [axis.select(x, torch.tensor(index)) for index in (a, b)]
    assert torch.equal(axis.concat(parts), axis.select(x, torch.tensor(a + b)))
