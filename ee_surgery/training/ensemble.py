"""The second step of Zero Time Waste: weights of the geometric ensembles, fitted on recorded answers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ee_surgery.branches.branch_list import BranchBank
from ee_surgery.branches.chained import Ensemble

_BATCH = 512
_LR = 5e-4


def ensembles(bank: BranchBank) -> dict[int, Ensemble]:
    """The ensembles of a bank, by the number of their branch."""
    found = {k: getattr(branch, "ensemble", None) for k, branch in enumerate(bank)}
    return {k: ensemble for k, ensemble in found.items() if isinstance(ensemble, Ensemble)}


def fit_ensembles(bank: BranchBank, log_p: Tensor, labels: Tensor, epochs: int) -> None:
    """Fit all ensembles at once by cross-entropy.

    Args:
        log_p: log-probabilities of the branches, (N, branches, C).
        labels: int64 (N,) or probabilities (N, C).
    Source: Zero Time Waste (Wolczyk et al., NeurIPS 2021): Adam at 5e-4, batches of 512, about 500 passes.
    """
    found = ensembles(bank)
    heads = log_p.shape[1]
    # (branch, averaged branch): a branch averages over itself and earlier ones
    reach = torch.ones(heads, heads, device=log_p.device).tril()
    weight = torch.zeros(heads, heads, device=log_p.device)
    bias = torch.zeros(heads, log_p.shape[2], device=log_p.device)
    for k, ensemble in found.items():
        weight[k, : k + 1], bias[k] = ensemble.weight.detach().float(), ensemble.bias.detach().float()
    weight.requires_grad_()
    bias.requires_grad_()
    optimizer = torch.optim.Adam([weight, bias], lr=_LR)
    kept = torch.tensor(sorted(found), device=log_p.device)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(log_p), generator=generator).to(log_p.device).split(_BATCH):
            mean = torch.einsum("kj,njc->knc", weight.exp() * reach / reach.sum(1, keepdim=True), log_p[rows])
            logits = (mean + bias[:, None])[kept]
            target = labels[rows].expand(len(kept), *labels[rows].shape).flatten(0, 1)
            loss = F.cross_entropy(logits.flatten(0, 1), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        for k, ensemble in found.items():
            ensemble.weight.copy_(weight[k, : k + 1])
            ensemble.bias.copy_(bias[k])
