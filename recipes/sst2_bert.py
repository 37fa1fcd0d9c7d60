"""Early exit on a text classifier: a 6-layer BERT on SST-2 with an exit after each layer.

    python -m recipes.sst2_bert

The tokenizer and the network are trained here, on the 6,920 training sentences only, with `tokenizers` and the Trainer
of transformers; that network serves as the pretrained one. Its branches are trained on the same sentences, thresholds
come from the 872 development sentences, and results are on the 1,821 test sentences; all of it for each seed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

import ee_surgery as ee
from ee_surgery.evaluation.latency import environment
from recipes import data

REQUESTS: dict[str, dict[str, Any]] = {
    "drop 0": {"max_accuracy_drop": 0.0},
    "drop 0.5 points": {"max_accuracy_drop": 0.005},
    "drop 1 point": {"max_accuracy_drop": 0.01},
    "budget 0.6": {"budget": 0.6},
    "budget 0.4": {"budget": 0.4},
}
Sentences = list[tuple[str, int]]


def tokenizer_of(sentences: Sentences, size: int) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer trained on the sentences."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # pyright: ignore[reportCallIssue]
    raw.normalizer = normalizers.BertNormalizer()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special)
    raw.train_from_iterator((text for text, _ in sentences), trainer)
    first, last = special.index("[CLS]"), special.index("[SEP]")
    raw.post_processor = processors.BertProcessing(("[SEP]", last), ("[CLS]", first))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask"],
    )


def encoded(sentences: Sentences, tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    """Token ids and labels, not padded yet."""
    ids = tokenizer([text for text, _ in sentences], truncation=True, max_length=64)
    return [{"input_ids": row, "labels": label} for row, (_, label) in zip(ids["input_ids"], sentences, strict=True)]


def trained(
    rows: list[dict[str, Any]], vocabulary: int, collate: Callable[..., Any], epochs: int, seed: int, out: Path
) -> BertForSequenceClassification:
    """A 6-layer BERT, trained from scratch."""
    set_seed(seed)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=64,
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.2,
    )
    model = BertForSequenceClassification(config)
    arguments = TrainingArguments(
        output_dir=str(out),
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        learning_rate=3e-4,
        weight_decay=0.01,
        warmup_steps=200,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=rows, data_collator=collate).train()  # pyright: ignore[reportArgumentType]
    return model.eval()


def main() -> None:
    """Train, calibrate and evaluate once for every seed; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8, help="of the network; its branches train for half as many")
    parser.add_argument("--out", type=Path, default=Path("runs/sst2_bert"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="a few sentences, one epoch")
    options = parser.parse_args()
    few = 128 if options.smoke else None
    epochs = 1 if options.smoke else options.epochs
    torch.set_num_threads(options.threads)
    console = Console(width=160, record=True)

    splits = {name: data.sst2(name)[:few] for name in ("train", "dev", "test")}
    tokenizer = tokenizer_of(splits["train"], 4000)
    # Lengths are rounded up to a few values: each is captured once.
    collate = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=16)
    rows = {name: encoded(split, tokenizer) for name, split in splits.items()}
    loaders = {
        name: DataLoader(part, 64, shuffle=name == "train", collate_fn=collate)  # pyright: ignore[reportArgumentType]
        for name, part in rows.items()
    }
    found: dict[str, list[ee.Evaluation]] = {name: [] for name in REQUESTS}
    alone, exits, receipt = [], [], None
    for seed in range(1 if options.smoke else options.seeds):
        model = trained(rows["train"], len(tokenizer), collate, epochs, seed, options.out)
        typical = collate(rows["train"][:4])
        sample = {"input_ids": typical["input_ids"], "attention_mask": typical["attention_mask"]}
        branched = ee.augment(model, [f"bert.encoder.layer.{i}" for i in range(5)], sample=sample, seed=seed)
        ee.train(branched, loaders["train"], ee.TrainConfig(epochs=max(1, epochs // 2), lr=1e-3, seed=seed))
        frontier = ee.calibrate(branched, loaders["dev"])
        for name, request in REQUESTS.items():
            branched.operate(frontier.at(**request))
            found[name].append(ee.evaluate(branched, loaders["test"]))
        alone.append(ee.record(branched, loaders["test"]).accuracies)
        exits, receipt = branched.exits, branched.receipt()

    table = Table(box=box.MARKDOWN)
    for column in ("", "accuracy %", "below original", "mean MACs %", "share at each exit"):
        table.add_column(column, justify="right")
    table.add_row("original", _spread([e.original_accuracy for e in found["drop 0"]]), "", "100", "")
    for name, runs in found.items():
        columns = zip(*(run.exit_shares for run in runs), strict=True)
        table.add_row(
            name,
            _spread([run.accuracy for run in runs]),
            _spread([run.original_accuracy - run.accuracy for run in runs]),
            _spread([run.macs_fraction for run in runs]),
            " ".join(f"{statistics.mean(column):.0%}" for column in columns),
        )
    console.print(table)
    means = ", ".join(f"{statistics.mean(column):.2%}" for column in zip(*alone, strict=True))
    console.print(f"Each exit alone on the test set, the original last: {means}. Exits at {', '.join(exits)}.")
    console.print(f"Seeds 0 to {len(alone) - 1}, {epochs} epochs of the network, {environment(torch.device('cpu'))}.")
    console.print(f"Original {receipt}.")
    options.out.mkdir(parents=True, exist_ok=True)
    console.save_text(str(options.out / "report.md"))


def _spread(values: list[float]) -> str:
    deviation = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{deviation}"


if __name__ == "__main__":
    main()
