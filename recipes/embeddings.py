"""Early exits for embeddings: retrieval by features of the CIFAR ResNet-56, or by MiniLM's sentence embeddings.

    python -m recipes.embeddings resnet56           # a gallery of CIFAR-10 training images, test images ask
    python -m recipes.embeddings minilm             # a gallery of AG News texts, other texts ask
    python -m recipes.embeddings resnet56 --floor 0.9      # no gallery: a cosine of 0.9 to the original's embedding

Labels are not needed to train: a branch learns the original's embedding. With a gallery, thresholds come from the
recall@1 on held-out queries, and the softmax over the gallery says when to leave; without, a confidence unit does.
Half of the queries given to `calibrate=` choose exits, half thresholds; others are reported.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import ee_surgery as ee
from ee_surgery.evaluation.latency import environment
from recipes import data
from recipes.cifar10_resnet56 import network, pictures
from recipes.text_minilm import BATCH, LONGEST, pretrained

DROPS = (0.0, 0.005, 0.01, 0.02, 0.05)
SCALE = 20.0
Batch = tuple[Any, Tensor]


class Queries(NamedTuple):
    """A network from samples to embeddings, and its data; labels are of the classes that the gallery has."""

    model: nn.Module
    train: Any
    """Unlabelled."""
    gallery: list[Batch]
    calibrate: list[Batch]
    test: list[Batch]


class SentenceEncoder(nn.Module):
    """MiniLM with the mean over the tokens that are no padding, as sentence-transformers pools."""

    def __init__(self) -> None:
        from transformers import AutoModel

        super().__init__()
        self.bert = AutoModel.from_pretrained(pretrained())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token ids (B, T) -> (B, 384)."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)


def resnet56(few: int | None) -> Queries:
    """Features before the classifier, (B, 64); 2,000 of the training images are the gallery."""
    images, mean, std = pictures("train", few)
    (train, labels), cut = images, 2000 if few is None else few // 2
    model = network(56)
    model.linear = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]

    def batches(x: Tensor, y: Tensor) -> list[Batch]:
        x = (x.float() / 255 - mean) / std
        return list(zip(x.split(200), y.split(200), strict=True))

    (asked, truth), _, _ = pictures("test", few)
    split = 4000 if few is None else few // 2
    return Queries(
        model,
        ee.AugmentedBatches(train[cut:], None, mean=mean, std=std, batch_size=min(128, len(train) - cut)),
        batches(train[:cut], labels[:cut]),
        batches(asked[:split], truth[:split]),
        batches(asked[split:], truth[split:]),
    )


def minilm(few: int | None) -> Queries:
    """Sentence embeddings, (B, 384), of the test set of AG News: 1,000 texts are the gallery, 3,600 train."""
    from transformers import AutoTokenizer

    texts = data.ag_news()
    random.Random(0).shuffle(texts)
    if few is not None:
        texts = texts[: 4 * few]
    tokenizer = AutoTokenizer.from_pretrained(pretrained())

    def batches(part: Sequence[tuple[str, int]]) -> list[Batch]:
        part = sorted(part, key=lambda text: len(text[0]))
        pieces = [part[i : i + BATCH] for i in range(0, len(part), BATCH)]
        options = {"truncation": True, "max_length": LONGEST, "padding": True, "pad_to_multiple_of": 16}
        found = [tokenizer([text for text, _ in piece], return_tensors="pt", **options) for piece in pieces]
        return [
            ({name: each[name] for name in ("input_ids", "attention_mask")}, torch.tensor([k for _, k in piece]))
            for each, piece in zip(found, pieces, strict=True)
        ]

    cuts = [0, 1000, 4600, 6100, 7600] if few is None else [0, few, 2 * few, 3 * few, 4 * few]
    gallery, train, calibrate, test = (batches(texts[a:b]) for a, b in itertools.pairwise(cuts))
    return Queries(SentenceEncoder(), [inputs for inputs, _ in train], gallery, calibrate, test)


NETWORKS = {"resnet56": resnet56, "minilm": minilm}


def embedded(answer: Any, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """Embeddings of length 1, (N, D), and labels (N,)."""
    with torch.no_grad():
        found = [F.normalize(answer(inputs), dim=1) for inputs, _ in batches]
    return torch.cat(found), torch.cat([labels for _, labels in batches])


def main() -> None:
    """Find and train exits, calibrate, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", nargs="?", choices=list(NETWORKS), default="resnet56")
    parser.add_argument("--floor", type=float, help="cosine that counts as the same embedding, in place of a gallery")
    parser.add_argument("--effort", choices=("quick", "standard", "best"), default="quick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/embeddings"))
    parser.add_argument("--smoke", action="store_true", help="a few samples, few steps")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=160, record=True)
    out = options.out / f"{options.network}-{'gallery' if options.floor is None else options.floor}-{options.seed}"
    queries = NETWORKS[options.network](256 if options.smoke else None)
    model = queries.model.eval()

    def original(inputs: Any) -> Tensor:
        return model(**inputs) if isinstance(inputs, dict) else model(inputs)

    gallery, classes = embedded(original, queries.gallery)
    with_gallery = options.floor is None
    task = ee.Embedding(options.floor) if options.floor is not None else ee.Gallery(gallery, classes, scale=SCALE)
    inputs = queries.gallery[0][0]
    sample = {name: x[:2] for name, x in inputs.items()} if isinstance(inputs, dict) else inputs[:2]
    started = time.perf_counter()
    branched = ee.augment(
        model,
        sample=sample,
        task=task,
        train=queries.train,
        calibrate=queries.calibrate if with_gallery else ee.unlabelled(queries.calibrate),
        effort="quick" if options.smoke else options.effort,
        time_budget=0.2 if options.smoke else None,
        seed=options.seed,
    )
    minutes = (time.perf_counter() - started) / 60
    branched.save_pretrained(out / "adapter")
    ee.record(branched, queries.test if with_gallery else ee.unlabelled(queries.test)).save(out / "test.safetensors")

    own, truth = embedded(original, queries.test)
    right = (classes[(own @ gallery.T).argmax(1)] == truth).double().mean().item()
    table = Table(box=box.MARKDOWN)
    for column in ("", "recall@1 %", "below original", "mean cosine", "mean MACs %", "share at each exit"):
        table.add_column(column, justify="right")
    table.add_row("original", f"{100 * right:.2f}", "", "1", "100", "")
    frontier = branched.frontier
    assert frontier is not None
    for drop in DROPS:
        branched.operate(frontier.at(max_accuracy_drop=drop))
        outputs = [branched.predict(inputs) for inputs, _ in queries.test]
        found = F.normalize(torch.cat([output.logits for output in outputs]), dim=1)
        recall = (classes[(found @ gallery.T).argmax(1)] == truth).double().mean().item()
        exits = torch.cat([output.exit_index for output in outputs])
        macs = torch.cat([output.macs_fraction for output in outputs]).mean().item()
        shares = [(exits == k).double().mean().item() for k in range(len(branched.exits) + 1)]
        table.add_row(
            f"drop {100 * drop:g} points" + ("" if with_gallery else " of the share above the floor"),
            f"{100 * recall:.2f}",
            f"{100 * (right - recall):.2f}",
            f"{(found * own).sum(1).mean().item():.3f}",
            f"{100 * macs:.1f}",
            " ".join(f"{share:.0%}" for share in shares),
        )
    console.print(table)
    branches = ", ".join(f"{name} ({spec.name})" for name, spec in zip(branched.exits, branched.specs, strict=True))
    console.print(f"Exits at {branches}; score {frontier[0].score}. Gallery of {len(gallery)}, {len(truth)} queries.")
    console.print(
        f"Seed {options.seed}; the one line ({options.effort}) {minutes:.0f} min; {environment(torch.device('cpu'))}."
    )
    console.print(f"Original {branched.receipt()}.")
    console.save_text(str(out / "report.md"))


if __name__ == "__main__":
    main()
