"""At home in transformers: Auto classes, pipelines and Trainer on adapters, and pictures prepared as the base wants."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTImageProcessor,
    pipeline,
)
from transformers.modeling_outputs import ImageClassifierOutput, SequenceClassifierOutput

import ee_surgery as ee
from ee_surgery.files import sealed
from ee_surgery.integrations import exit_metrics, register
from ee_surgery.integrations.transformers import (
    EarlyExitConfig,
    EarlyExitForImageClassification,
    EarlyExitForSequenceClassification,
)
from ee_surgery.training.loss import batch_loss, relative_costs
from recipes import validate
from tests.hub_server import Hub

_TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
_NAMES = {i: f"animal {i}" for i in range(5)}


def _vit() -> transformers.ViTForImageClassification:
    config = transformers.ViTConfig(image_size=32, patch_size=8, id2label=_NAMES, **_TINY)
    return transformers.ViTForImageClassification(config)


def _bert() -> transformers.BertForSequenceClassification:
    config = transformers.BertConfig(vocab_size=40, max_position_embeddings=32, num_labels=3, **_TINY)
    return transformers.BertForSequenceClassification(config)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: timm.create_model("test_resnet", num_classes=5),
    "vit": _vit,
    "bert": _bert,
}


@cache
def base(kind: str) -> nn.Module:
    """Fixed random weights; shared."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MAKERS[kind]().eval()


def inputs(kind: str, batch: int = 12) -> dict[str, Tensor]:
    """Random inputs as transformers names them."""
    generator = torch.Generator().manual_seed(1)
    if kind != "bert":
        side = 64 if kind == "timm" else 32
        return {"pixel_values": torch.randn(batch, 3, side, side, generator=generator)}
    ids = torch.randint(5, 40, (batch, 16), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, 10:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def given(kind: str, batch: int = 12) -> Any:
    """The same, as the library takes them."""
    found = inputs(kind, batch)
    return found["pixel_values"] if kind == "timm" else found


@cache
def routed(kind: str) -> ee.EarlyExitModel:
    """Two exits and an operating point at which some samples leave at each; shared: leave it as it was."""
    model = ee.augment(base(kind), 2, sample=given(kind, 4))
    with torch.no_grad():
        for parameter in model.branches.parameters():  # answers of different samples should differ
            if parameter.ndim == 2:
                parameter.mul_(4)
    _operate(model, kind)
    return model


def _operate(model: ee.EarlyExitModel, kind: str) -> None:
    """A frontier, and thresholds in the middle of what each exit is sure of: samples leave at every one."""
    ee.calibrate(model, [given(kind, 40)])
    sure = ee.record(model, [given(kind, 40)]).logits.softmax(-1).amax(-1)
    model.operate(thresholds=sure.median(1).values[:-1].tolist())


def own(kind: str) -> ee.EarlyExitModel:
    """One to train: over a base of its own, without an operating point."""
    model = routed(kind).copy()
    model.operate(None)
    return model


@pytest.fixture(params=["timm", "vit", "bert"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def auto(kind: str) -> Any:
    return AutoModelForSequenceClassification if kind == "bert" else AutoModelForImageClassification


def pictures(count: int = 6) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [
        Image.fromarray(generator.integers(0, 256, (40 + 9 * i, 70, 3), dtype=np.uint8)).resize((90, 120))
        for i in range(count)
    ]


# --- registration

IMPORTS = """
import sys, importlib.util
import ee_surgery
assert "transformers" not in sys.modules, "ee_surgery alone imports transformers"
assert importlib.util.find_spec("transformers")  # a library that asks whether it is installed
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
print(CONFIG_MAPPING["ee_surgery"].__name__, len(sys.meta_path))
"""


def test_transformers_is_not_imported_by_us_but_knows_us_when_it_is() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("EarlyExitConfig")


def test_registering_twice_changes_nothing() -> None:
    register()
    register()
    assert transformers.AutoConfig.for_model("ee_surgery").model_type == "ee_surgery"
    assert len([finder for finder in sys.meta_path if type(finder).__name__ == "_OnImport"]) == 0


# --- both roads


def test_both_roads_give_the_same_bits(kind: str, tmp_path: Path) -> None:
    model = routed(kind)
    folder = model.save_pretrained(tmp_path / "adapter")
    wrapped = auto(kind).from_pretrained(folder, base_model=base(kind))
    assert isinstance(wrapped, transformers.PreTrainedModel)
    assert not wrapped.training
    expected = ee.from_pretrained(folder, base(kind)).predict(given(kind))
    found = wrapped(**inputs(kind))
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.exit_index, expected.exit_index)
    assert torch.equal(found.macs, expected.macs)
    assert len(set(found.exit_index.tolist())) > 1
    assert wrapped.exit_counts == dict(
        zip((*model.exits, "original"), torch.bincount(expected.exit_index, minlength=3).tolist(), strict=True)
    )
    # and back: what the wrapper saves, the library loads
    wrapped.save_pretrained(tmp_path / "again")
    for name in ("ee_adapter.safetensors", "frontier.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert not list((tmp_path / "again").glob("*model*.safetensors"))
    if kind == "timm":
        again = ee.from_pretrained(tmp_path / "again", base(kind)).predict(given(kind))
        assert torch.equal(again.logits, expected.logits)
    assert wrapped.branched.receipt().unchanged


def test_answers_are_of_the_base_s_class_with_exits_in_addition(kind: str) -> None:
    plain = {"timm": ImageClassifierOutput, "vit": ImageClassifierOutput, "bert": SequenceClassifierOutput}[kind]
    cls = EarlyExitForSequenceClassification if kind == "bert" else EarlyExitForImageClassification
    wrapped = cls.of(routed(kind))
    output = wrapped(**inputs(kind))
    assert isinstance(output, plain)
    assert list(output) == ["logits", "exit_index", "score", "macs"]
    as_tuple = wrapped(**inputs(kind), return_dict=False)
    assert [torch.equal(a, b) or bool(a.isnan().any()) for a, b in zip(as_tuple, output.values(), strict=True)]
    labels = torch.zeros(12, dtype=torch.long)
    labelled = wrapped(**inputs(kind), labels=labels)
    torch.testing.assert_close(labelled.loss, F.cross_entropy(output.logits, labels))
    assert torch.equal(labelled[1], output.logits)  # loss first, as everywhere


def test_without_an_operating_point_the_answer_is_the_original_s(kind: str) -> None:
    model = routed(kind)
    cls = EarlyExitForSequenceClassification if kind == "bert" else EarlyExitForImageClassification
    with torch.no_grad(), model.exits_disabled():
        output = cls.of(model)(**inputs(kind))
        expected = model.backbone(given(kind)) if kind == "timm" else model.backbone(**inputs(kind)).logits
    assert torch.equal(output.logits, expected)
    assert set(output.exit_index.tolist()) == {2}


def test_the_wrapper_shows_branches_alone(kind: str) -> None:
    model = routed(kind)
    wrapped = EarlyExitForImageClassification.of(model)
    assert {id(p) for p in wrapped.parameters()} == {id(p) for p in model.branches.parameters()}
    assert set(wrapped.state_dict()) == {f"branches.{name}" for name in model.branches.state_dict()}
    assert wrapped.num_parameters() == sum(p.numel() for p in model.branches.parameters())


def test_casting_and_moving_take_the_original_along() -> None:
    wrapped = EarlyExitForImageClassification.of(own("vit")).to(torch.bfloat16)
    assert {p.dtype for p in wrapped.branched.parameters()} == {torch.bfloat16}
    output = wrapped(pixel_values=inputs("vit")["pixel_values"].bfloat16())
    assert output.logits.dtype == torch.bfloat16
    assert {p.device.type for p in wrapped.to("meta").branched.parameters()} == {"meta"}


# --- configuration and labels


def test_the_configuration_is_the_adapter_s_with_the_base_s_labels(tmp_path: Path) -> None:
    folder = routed("vit").save_pretrained(tmp_path / "adapter")
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is EarlyExitConfig
    assert config.id2label == _NAMES
    assert config.label2id == {name: i for i, name in _NAMES.items()}
    assert [exit["name"] for exit in config.exits] == routed("vit").exits
    assert json.loads(config.to_json_string())["base"]["library"] == "transformers"
    renamed = AutoModelForImageClassification.from_pretrained(
        folder, base_model=base("vit"), id2label={i: f"bird {i}" for i in range(5)}
    )
    assert renamed.config.id2label[3] == "bird 3"
    with pytest.raises(ee.ConfigError, match="7 class names for a base with 5 classes"):
        AutoModelForImageClassification.from_pretrained(folder, base_model=base("vit"), num_labels=7)


def test_timm_bases_with_the_classes_of_imagenet_have_their_names() -> None:
    config = EarlyExitConfig(base={"library": "timm", "num_classes": 1000})
    assert config.id2label is not None
    assert config.id2label[0].startswith("tench")
    assert EarlyExitConfig(base={"library": "timm", "num_classes": 7}).num_labels == 7


# --- pipelines


def _saved(kind: str, folder: Path, processor: Any) -> Path:
    """Its adapter with a processor, on a folder of its own; the model forgets it."""
    try:
        return routed(kind).save_pretrained(folder / "adapter", processor=processor)
    finally:
        routed(kind).processor = None


@pytest.mark.parametrize("kind", ["timm", "vit"])
def test_an_image_pipeline_gives_the_routed_labels_and_scores_and_counts_exits(kind: str, tmp_path: Path) -> None:
    processor = None if kind == "timm" else ViTImageProcessor(size={"height": 32, "width": 32})
    folder = _saved(kind, tmp_path, processor)
    pipe = pipeline("image-classification", model=str(folder), model_kwargs={"base_model": base(kind)}, device="cpu")
    loaded = ee.from_pretrained(folder, base(kind))
    pixels = torch.stack([loaded.transform()(picture) for picture in pictures()])
    expected = loaded.predict(pixels)
    found = pipe(pictures(), batch_size=6, top_k=5)
    for answers, logits in zip(found, expected.logits, strict=True):
        scores = {answer["label"]: answer["score"] for answer in answers}
        wanted = {pipe.model.config.id2label[i]: s for i, s in enumerate(logits.softmax(-1).tolist())}
        assert scores == pytest.approx(wanted, abs=1e-6)
        assert answers[0]["label"] == pipe.model.config.id2label[int(logits.argmax())]
    counts = torch.bincount(expected.exit_index, minlength=3).tolist()
    assert list(pipe.model.exit_counts.values()) == counts
    pipe.model.reset_exit_counts()
    assert sum(pipe.model.exit_counts.values()) == 0


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(38))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "attention_mask"],
    )


def test_a_text_pipeline_takes_the_tokenizer_that_was_saved_along(tmp_path: Path) -> None:
    model = routed("bert")
    folder = _saved("bert", tmp_path, tokenizer())
    pipe = pipeline("text-classification", model=str(folder), model_kwargs={"base_model": base("bert")}, device="cpu")
    texts = [" ".join(f"w{(7 * i + j) % 38}" for j in range(12)) for i in range(4)]
    expected = model.predict(**AutoTokenizer.from_pretrained(folder)(texts, return_tensors="pt"))
    found = pipe(texts, batch_size=4)
    assert [answer["label"] for answer in found] == [f"LABEL_{i}" for i in expected.logits.argmax(-1)]
    assert [a["score"] for a in found] == pytest.approx(expected.logits.softmax(-1).amax(-1).tolist(), abs=1e-5)


# --- how pictures are prepared


def test_the_adapter_of_a_timm_base_prepares_pictures_as_timm_does(tmp_path: Path) -> None:
    folder = routed("timm").save_pretrained(tmp_path / "adapter")
    wanted = create_transform(**resolve_model_data_config(base("timm")))
    processor, loaded = AutoImageProcessor.from_pretrained(folder), ee.from_pretrained(folder, base("timm"))
    for picture in pictures(2):
        assert torch.equal(processor(picture, return_tensors="pt")["pixel_values"][0], wanted(picture))
        assert torch.equal(loaded.transform()(picture), wanted(picture))
    augmented = str(loaded.transform(is_training=True))
    assert "RandomResizedCrop" in augmented


def test_settings_of_the_adapter_win_over_those_of_the_base(tmp_path: Path) -> None:
    model = own("timm")
    assert model.preprocessing is not None
    model.preprocessing = {**model.preprocessing, "input_size": [3, 48, 48]}
    folder = model.save_pretrained(tmp_path / "adapter")
    loaded = ee.from_pretrained(folder, base("timm"))
    assert loaded.transform()(pictures(1)[0]).shape == (3, 48, 48)
    assert ee.from_pretrained(loaded.save_pretrained(tmp_path / "again"), base("timm")).preprocessing == (
        model.preprocessing
    )


def test_an_image_processor_is_saved_along_and_stays_through_another_save(tmp_path: Path) -> None:
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3])
    loaded = ee.from_pretrained(_saved("vit", tmp_path, processor), base("vit"))
    again = ee.from_pretrained(loaded.save_pretrained(tmp_path / "two"), base("vit"))
    picture = pictures(1)[0].convert("L")
    wanted = processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(again.transform()(picture), wanted)
    assert torch.equal(AutoImageProcessor.from_pretrained(tmp_path / "two")(picture.convert("RGB"))["pixel_values"][0],
                       wanted)  # fmt: skip
    with pytest.raises(ee.DataError, match="your own transforms"):
        again.transform(is_training=True)


def test_a_base_with_a_folder_brings_its_processor(tmp_path: Path) -> None:
    base("vit").save_pretrained(tmp_path / "base")
    ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(tmp_path / "base")
    named = transformers.ViTForImageClassification.from_pretrained(tmp_path / "base")
    model = ee.augment(named, 2)
    assert model.transform()(pictures(1)[0]).shape == (3, 24, 24)
    folder = model.save_pretrained(tmp_path / "adapter")
    assert json.loads((folder / "preprocessor_config.json").read_text())["size"] == {"height": 24, "width": 24}
    again = AutoModelForImageClassification.from_pretrained(folder, base_model=named)
    assert again.config.id2label == _NAMES


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_a_base_that_does_not_say_how_it_is_fed_is_named(kind: str) -> None:
    with pytest.raises(ee.DataError, match=r"image processor|your own transform"):
        routed(kind).transform()


# --- Trainer


class _Rows(torch.utils.data.Dataset):  # pyright: ignore[reportMissingTypeArgument]
    def __init__(self, kind: str, labelled: bool = True) -> None:
        self.columns = inputs(kind, 24)
        if labelled:
            classes = 3 if kind == "bert" else 5
            self.columns["labels"] = torch.arange(24) % classes

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def _arguments(folder: Path, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **{"max_steps": 3, "save_strategy": "no", **more},
    )


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def test_trainer_changes_branches_and_nothing_else(kind: str, tmp_path: Path) -> None:
    model = own(kind)
    original = model.backbone
    flags = [(p.requires_grad, m.training) for m in original.modules() for p in m.parameters(recurse=False)]
    before = _state(model.branches)
    cls = EarlyExitForSequenceClassification if kind == "bert" else EarlyExitForImageClassification
    rows = _Rows(kind)

    def accuracy(found: Any) -> dict[str, float]:
        classes = 3 if kind == "bert" else 5
        assert [logits.shape for logits in found.predictions] == [(24, classes), (24, 3, classes)]
        return {"accuracy": float((found.predictions[0].argmax(-1) == found.label_ids).mean())}

    trainer = Trainer(
        cls.of(model), _arguments(tmp_path), train_dataset=rows, eval_dataset=rows, compute_metrics=accuracy
    )
    first = trainer.evaluate()
    trainer.train()
    after = model.branches.state_dict()
    moved = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert {name.split(".")[1] for name in moved} == {"0", "1"}  # both branches
    assert model.receipt().unchanged
    now = [(p.requires_grad, m.training) for m in original.modules() for p in m.parameters(recurse=False)]
    assert now == flags
    assert all(p.grad is None for p in original.parameters())
    last = trainer.evaluate()
    assert last["eval_accuracy"] == first["eval_accuracy"]  # no operating point: the original's answers,
    assert last["eval_loss"] < first["eval_loss"]  # but the exits' loss
    assert trainer.state.log_history[-2]["train_loss"] > 0


def test_trainer_refuses_the_model_that_is_not_wrapped(tmp_path: Path) -> None:
    with pytest.raises(ee.ConfigError, match=r"Trainer\(EarlyExitForImageClassification.of\(branched\)"):
        Trainer(own("vit"), _arguments(tmp_path), train_dataset=_Rows("vit"))  # would train the original


def test_callbacks_see_the_metrics_of_exits_and_end_the_training(tmp_path: Path) -> None:
    wrapped, rows, seen = EarlyExitForImageClassification.of(own("vit")), _Rows("vit"), []

    class Log(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **more: Any) -> None:
            seen.append(metrics)

    more = {"max_steps": 20, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    arguments = _arguments(tmp_path, **more, load_best_model_at_end=True, metric_for_best_model="accuracy_original")
    stop = EarlyStoppingCallback(early_stopping_patience=1)  # the original's accuracy never changes
    metrics = exit_metrics(wrapped, max_accuracy_drop=None)
    trainer = Trainer(
        wrapped, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics, callbacks=[Log(), stop]
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert {"eval_accuracy_exit_0", "eval_accuracy_exit_1", "eval_accuracy_exits"} <= seen[-1].keys()


@pytest.mark.parametrize("kind", ["timm", "bert"])
def test_the_loss_is_that_of_the_library(kind: str) -> None:
    model = own(kind)
    config = ee.TrainConfig(objective="sum_ce", distill=0.25, temperature=3.0)
    cls = EarlyExitForSequenceClassification if kind == "bert" else EarlyExitForImageClassification
    wrapped = cls.of(model, config).train()
    labels = torch.arange(12) % 3
    torch.manual_seed(3)
    found = wrapped(**inputs(kind), labels=labels)
    torch.manual_seed(3)
    features, original = model.engine.features(given(kind))
    answers = [answer.logits for answer in model.branches(features)]
    hard = sum(F.cross_entropy(z, labels) for z in answers)
    soft = sum(
        9 * F.kl_div((z / 3).log_softmax(-1), (original / 3).log_softmax(-1), log_target=True, reduction="batchmean")
        for z in answers
    )
    torch.testing.assert_close(found.loss, 0.75 * hard + 0.25 * soft)
    assert torch.equal(found.logits, original)
    found.loss.backward()
    assert all(p.grad is not None for p in model.branches.parameters())
    wrapped.train_config = ee.TrainConfig(distill_from=0.5)
    with pytest.raises(ee.ConfigError, match="progress of training"):
        wrapped(**inputs(kind), labels=labels)


def test_trainer_learns_without_labels_from_the_original(tmp_path: Path) -> None:
    model = own("vit")
    before = _state(model.branches)
    wrapped = EarlyExitForImageClassification.of(model, ee.TrainConfig(teach="original"))
    Trainer(wrapped, _arguments(tmp_path), train_dataset=_Rows("vit", labelled=False)).train()
    assert any(not torch.equal(value, before[name]) for name, value in model.branches.state_dict().items())
    assert model.receipt().unchanged


def test_accumulated_gradients_are_those_of_the_large_batch(tmp_path: Path) -> None:
    model, results = own("vit"), []
    start = _state(model.branches)
    for batch, steps in ((24, 1), (8, 3)):
        model.branches.load_state_dict(start)
        arguments = _arguments(tmp_path, max_steps=1, gradient_accumulation_steps=steps, optim="sgd", max_grad_norm=0.0)
        arguments.per_device_train_batch_size = batch
        Trainer(EarlyExitForImageClassification.of(model).train(), arguments, train_dataset=_Rows("vit")).train()
        results.append(_state(model.branches))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], atol=1e-5, rtol=1e-4)


def test_checkpoints_are_adapter_folders_that_trainer_goes_on_from(tmp_path: Path) -> None:
    model, rows = own("vit"), _Rows("vit")
    start = _state(model.branches)
    more = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_only_model": False}
    Trainer(EarlyExitForImageClassification.of(model), _arguments(tmp_path, **more), train_dataset=rows).train()
    whole = _state(model.branches)
    folder = tmp_path / "checkpoint-2"
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "ee_adapter.safetensors", "model.safetensors"} <= names
    stored = load_file(folder / "model.safetensors")
    assert set(stored) == {f"branches.{name}" for name in whole}
    halfway = ee.from_pretrained(folder, base("vit")).branches.state_dict()
    assert all(torch.equal(stored[f"branches.{name}"], value) for name, value in halfway.items())
    model.branches.load_state_dict(start)
    trainer = Trainer(EarlyExitForImageClassification.of(model), _arguments(tmp_path, **more), train_dataset=rows)
    trainer.train(resume_from_checkpoint=str(folder))
    assert trainer.state.global_step == 4
    for name, value in whole.items():
        assert torch.equal(value, model.branches.state_dict()[name]), name


# --- Trainer's evaluation


def _wrapped(kind: str, model: ee.EarlyExitModel | None = None) -> Any:
    cls = EarlyExitForSequenceClassification if kind == "bert" else EarlyExitForImageClassification
    return cls.of(model or own(kind))


def _evaluations(trainer: Trainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "eval_loss" in entry]


def test_evaluation_while_training_sees_every_exit(kind: str, tmp_path: Path) -> None:
    wrapped, rows = _wrapped(kind), _Rows(kind)
    arguments = _arguments(tmp_path, eval_strategy="steps", eval_steps=1)
    metrics = exit_metrics(wrapped)
    trainer = Trainer(wrapped, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics)
    trainer.train()
    found = _evaluations(trainer)
    assert len({entry["eval_loss"] for entry in found}) == 3
    assert len({entry["eval_accuracy_original"] for entry in found}) == 1
    records = ee.record(wrapped.branched, [(rows.columns | {"labels": rows.columns["labels"]})])
    wanted = [found[-1][f"eval_accuracy_{name}"] for name in ("exit_0", "exit_1", "original")]
    assert wanted == pytest.approx(records.accuracies)
    assert found[-1]["eval_accuracy_exits"] == pytest.approx(sum(records.accuracies[:-1]) / 2)
    point = ee.Frontier.search(records).at(max_accuracy_drop=0.01)
    assert found[-1]["eval_macs_saved"] == pytest.approx(1 - point.macs_fraction)


def test_the_loss_of_an_evaluation_is_the_objective_in_eval_mode() -> None:
    wrapped, labels = _wrapped("vit"), torch.arange(12) % 5
    found = wrapped.eval()(**inputs("vit"), labels=labels)
    answers, original = wrapped.branched.engine.answers(given("vit"))
    costs = relative_costs(wrapped.branched)
    torch.testing.assert_close(found.loss, batch_loss(answers, original, labels, costs, wrapped.train_config))
    assert torch.equal(found.exit_logits, wrapped.branched.all_exits(given("vit")).transpose(0, 1))
    assert torch.equal(found.logits, original)
    assert sum(wrapped.exit_counts.values()) == 12


def test_inference_returns_no_more_than_before() -> None:
    assert list(_wrapped("vit").eval()(**inputs("vit"))) == ["logits", "exit_index", "score", "macs"]


def test_an_evaluation_at_an_operating_point_is_of_the_answers_that_leave(tmp_path: Path) -> None:
    model, rows = routed("vit"), _Rows("vit")
    wrapped = _wrapped("vit", model)
    trainer = Trainer(wrapped, _arguments(tmp_path), eval_dataset=rows, compute_metrics=exit_metrics(wrapped))
    found = trainer.evaluate()
    expected = model.predict(rows.columns["pixel_values"])
    labels = rows.columns["labels"]
    assert found["eval_accuracy"] == pytest.approx((expected.logits.argmax(-1) == labels).float().mean().item())
    assert found["eval_loss"] == pytest.approx(F.cross_entropy(expected.logits, labels).item(), rel=1e-4)
    assert trainer.predict(rows).predictions.shape == (24, 5)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


def test_training_gives_up_the_operating_point_of_the_weights_before(tmp_path: Path) -> None:
    model = own("vit")
    _operate(model, "vit")
    wrapped, rows = _wrapped("vit", model), _Rows("vit")
    Trainer(wrapped, _arguments(tmp_path, max_steps=1), train_dataset=rows).train()
    assert model.operating_point is None
    assert model.frontier is None


@pytest.mark.parametrize(
    "metric",
    [
        pytest.param("loss", marks=pytest.mark.slow),
        pytest.param("accuracy_exits", marks=pytest.mark.slow),
        "macs_saved",
    ],
)
def test_the_best_of_several_checkpoints_is_that_of_the_exits(metric: str, tmp_path: Path) -> None:
    wrapped, rows = _wrapped("vit"), _Rows("vit")
    more = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    arguments = _arguments(tmp_path, **more, load_best_model_at_end=True, metric_for_best_model=metric)
    arguments.learning_rate = 0.3  # so large that the last step is not the best
    metrics = exit_metrics(wrapped)
    trainer = Trainer(wrapped, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics)
    trainer.train()
    values = [entry[f"eval_{metric}"] for entry in _evaluations(trainer)]
    best = min(values) if metric == "loss" else max(values)
    assert trainer.state.best_metric == pytest.approx(best)
    assert trainer.evaluate()[f"eval_{metric}"] == pytest.approx(best)


@pytest.mark.parametrize(
    "more",
    [{"batch_eval_metrics": True}, {"eval_accumulation_steps": 1}, {"eval_do_concat_batches": True, "bf16": True}],
    ids=str,
)
def test_every_way_of_gathering_gives_the_same_metrics(more: dict[str, Any], tmp_path: Path) -> None:
    wrapped, rows = _wrapped("vit", own("vit")), _Rows("vit")
    plain = Trainer(wrapped, _arguments(tmp_path), eval_dataset=rows, compute_metrics=exit_metrics(wrapped)).evaluate()
    arguments = _arguments(tmp_path, per_device_eval_batch_size=7, **more)
    found = Trainer(wrapped, arguments, eval_dataset=rows, compute_metrics=exit_metrics(wrapped)).evaluate()
    slack = 0.05 if "bf16" in more else 1e-6
    names = ["eval_accuracy_exit_0", "eval_accuracy_original"]
    for name in (*names, *(["eval_macs_saved"] * ("bf16" not in more))):  # thresholds of other logits are other ones
        assert found[name] == pytest.approx(plain[name], abs=slack), name


def test_losses_alone_are_those_of_the_exits(tmp_path: Path) -> None:
    wrapped, rows = _wrapped("vit"), _Rows("vit")
    arguments = _arguments(tmp_path, prediction_loss_only=True, per_device_eval_batch_size=24)
    found = Trainer(wrapped, arguments, eval_dataset=rows, compute_metrics=exit_metrics(wrapped)).evaluate()
    assert found["eval_loss"] == pytest.approx(wrapped(**rows.columns).loss.item(), rel=1e-5)


def test_samples_without_a_label_count_in_no_metric() -> None:
    model = routed("vit")
    logits = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, -100, 1, 2, -100, 3])
    known = labels >= 0
    whole = exit_metrics(model)(EvalPrediction((logits[:, -1].numpy(), logits.numpy()), labels.numpy()))
    part = exit_metrics(model)(
        EvalPrediction((logits[known, -1].numpy(), logits[known].numpy()), labels[known].numpy())
    )
    assert whole == part
    assert "macs_saved" not in exit_metrics(model, max_accuracy_drop=None)(
        EvalPrediction(logits.numpy(), labels.numpy())
    )
    with pytest.raises(ee.DataError, match="None of the evaluated samples"):
        exit_metrics(model)(EvalPrediction(logits.numpy(), labels.numpy() * 0 - 100))
    with pytest.raises(ee.DataError, match="preprocess_logits_for_metrics"):
        exit_metrics(model)(EvalPrediction(labels.numpy(), labels.numpy()))
    with pytest.raises(ee.ConfigError, match="one percentage point"):
        exit_metrics(model, max_accuracy_drop=1.5)


# --- Trainer's other ways to a loss


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_label_smoothing_of_trainer_is_refused_at_the_first_step(kind: str, tmp_path: Path) -> None:
    wrapped = _wrapped(kind)
    arguments = _arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ee.ConfigError, match=r"has no labels.*label_smoothing_factor"):
        Trainer(wrapped, arguments, train_dataset=_Rows(kind)).train()
    wrapped.train_config = ee.TrainConfig(teach="original")  # which does without labels
    with pytest.raises(ee.ConfigError, match=r"trains no branch.*label_smoothing_factor"):
        Trainer(wrapped, arguments, train_dataset=_Rows(kind)).train()


def test_a_loss_function_of_trainer_is_refused_at_the_first_step(tmp_path: Path) -> None:
    wrapped = _wrapped("vit")

    def loss(outputs: Any, labels: Tensor | None, num_items_in_batch: Any = None) -> Tensor:
        return F.cross_entropy(outputs.logits, labels)  # pyright: ignore[reportArgumentType]

    with pytest.raises(ee.ConfigError, match=r"has no labels.*compute_loss_func.*OBJECTIVES"):
        Trainer(wrapped, _arguments(tmp_path), train_dataset=_Rows("vit"), compute_loss_func=loss).train()


def test_a_loss_made_of_the_original_s_logits_is_refused() -> None:
    wrapped = _wrapped("vit").train()
    found = wrapped(**inputs("vit"), labels=torch.arange(12) % 5)
    with pytest.raises(ee.ConfigError, match="trains no branch"):
        found.logits.sum().backward()
    with torch.no_grad():
        assert wrapped(**inputs("vit")).loss is None


def test_smoothed_labels_of_a_collator_train(tmp_path: Path) -> None:
    wrapped, rows = _wrapped("vit"), _Rows("vit")
    rows.columns["labels"] = 0.9 * F.one_hot(rows.columns["labels"], 5).float() + 0.02
    trainer = Trainer(wrapped, _arguments(tmp_path), train_dataset=rows, eval_dataset=rows,
                      compute_metrics=exit_metrics(wrapped))  # fmt: skip
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < first


@pytest.mark.parametrize("more", [{"torch_compile": True, "torch_compile_backend": "eager"}, {"bf16": True}], ids=str)
def test_compiled_and_bfloat16_trainings_end_where_a_plain_one_does(more: dict[str, Any], tmp_path: Path) -> None:
    rows, losses = _Rows("timm"), []
    for options in ({}, more):
        torch.manual_seed(0)
        wrapped = _wrapped("timm")
        trainer = Trainer(wrapped, _arguments(tmp_path, **options), train_dataset=rows, eval_dataset=rows)
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
        assert wrapped.branched.receipt().unchanged
    assert losses[1] == pytest.approx(losses[0], rel=0.05 if "bf16" in more else 1e-4)


# --- refusals


def test_code_in_a_repository_is_never_run(tmp_path: Path) -> None:
    folder = routed("vit").save_pretrained(tmp_path / "adapter")
    trap = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(trap)!r}, 'w')\nclass EarlyExitConfig: ...\nclass Model: ...\n")
    data = json.loads((folder / "config.json").read_text())
    harmless = json.dumps(data)
    data["auto_map"] = {"AutoConfig": "evil.EarlyExitConfig", "AutoModelForImageClassification": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(sealed(data)))
    with pytest.raises(ee.AdapterError, match="auto_map"):
        AutoModelForImageClassification.from_pretrained(folder, base_model=base("vit"), trust_remote_code=True)
    processor = {"image_processor_type": "EvilProcessor", "auto_map": {"AutoImageProcessor": "evil.Model"}}
    (folder / "config.json").write_text(harmless)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.warns(UserWarning, match=r"preprocessor_config.json cannot be read"):
        assert ee.from_pretrained(folder, base("vit")).processor is None
    assert not trap.exists()


def test_what_has_no_meaning_for_an_adapter_is_refused(tmp_path: Path) -> None:
    folder = routed("vit").save_pretrained(tmp_path / "adapter")

    def load(**more: Any) -> Any:
        return AutoModelForImageClassification.from_pretrained(folder, base_model=base("vit"), **more)

    with pytest.raises(ee.ConfigError, match="quantization_config"):
        load(quantization_config={"bits": 4})
    with pytest.raises(ee.ConfigError, match="one device"):
        load(device_map={"a": "cpu", "b": "meta"})
    with pytest.raises(ee.ConfigError, match=r"casting it to torch\.bfloat16 would change your module"):
        load(dtype=torch.bfloat16)
    with pytest.raises(ee.ConfigError, match="floating type"):
        load(dtype="int8")
    assert load(dtype="auto", device_map={"": "cpu"}).dtype == torch.float32
    with pytest.raises(ee.ConfigError, match="has no branches"):
        AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(folder))
    with pytest.raises(ee.DataError, match="output_attentions"):
        load()(**inputs("vit"), output_attentions=True)
    with pytest.raises(ee.AdapterError, match="built from a configuration"):
        AutoModelForImageClassification.from_pretrained(folder)
    assert base("vit").dtype == torch.float32


# --- from the Hub


def test_auto_classes_and_pipelines_take_a_repository(hub: Hub, tmp_path: Path) -> None:
    base("vit").save_pretrained(tmp_path / "base")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "base")
    hub.put("user/vit", {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()})
    model = ee.augment(transformers.ViTForImageClassification.from_pretrained("user/vit"), 2)
    _operate(model, "vit")
    EarlyExitForImageClassification.of(model).push_to_hub("user/exits", commit_message="half way")
    assert "preprocessor_config.json" in hub.files("user/exits")
    first = hub.history("user/exits")[-1]
    model.operate(None)
    model.push_to_hub("user/exits")
    # by revision, the one with exits
    pinned = AutoModelForImageClassification.from_pretrained("user/exits", revision=first)
    expected = pinned.branched.predict(inputs("vit"))
    assert len(set(expected.exit_index.tolist())) > 1
    assert torch.equal(pinned(**inputs("vit")).logits, expected.logits)
    assert AutoConfig.from_pretrained("user/exits").id2label == _NAMES
    newest = AutoModelForImageClassification.from_pretrained("user/exits")
    assert set(newest(**inputs("vit")).exit_index.tolist()) == {2}
    pipe = pipeline("image-classification", model="user/exits", revision=first, device="cpu")
    pixels = torch.stack([pinned.branched.transform()(picture) for picture in pictures()])
    routed = pinned.branched.predict(pixels)
    found = pipe(pictures(), batch_size=6)
    assert [answers[0]["label"] for answers in found] == [_NAMES[int(i)] for i in routed.logits.argmax(-1)]
    assert [answers[0]["score"] for answers in found] == pytest.approx(
        routed.logits.softmax(-1).amax(-1).tolist(), abs=1e-6
    )
    assert list(pipe.model.exit_counts.values()) == torch.bincount(routed.exit_index, minlength=3).tolist()
    hub.stop()  # from the cache
    offline = AutoModelForImageClassification.from_pretrained("user/exits", revision=first, local_files_only=True)
    assert torch.equal(offline(**inputs("vit")).logits, expected.logits)


# --- the validate recipe


def test_validate_judges_an_adapter_beside_its_original(tmp_path: Path) -> None:
    model = own("timm")
    _operate(model, "timm")
    folder = model.save_pretrained(tmp_path / "adapter")
    torch.save(base("timm").state_dict(), tmp_path / "weights.pt")
    for i, picture in enumerate(pictures(10)):
        path = tmp_path / "pictures" / str(i % 5) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    common = [str(tmp_path / "pictures"), "--adapter", str(folder), "--base", str(tmp_path / "weights.pt")]
    results = tmp_path / "results.json"
    rows = validate.main(
        [*common, "--device", "cpu", "--batch-size", "4", "--workers", "0", "--results-file", str(results)]
    )
    data = torchvision.datasets.ImageFolder(tmp_path / "pictures", transform=model.transform())
    pixels, labels = torch.stack([x for x, _ in data]), torch.tensor([y for _, y in data])
    original, routed = model.all_exits(pixels)[-1], model.predict(pixels)
    assert rows[0].top1 == pytest.approx(float((original.argmax(-1) == labels).float().mean()))
    assert rows[1].top1 == pytest.approx(float((routed.logits.argmax(-1) == labels).float().mean()))
    assert rows[1].top5 == 1.0  # of five classes
    assert rows[1].macs_fraction == pytest.approx(float(routed.macs_fraction.mean()))
    assert rows[1].exit_shares == pytest.approx((torch.bincount(routed.exit_index, minlength=3) / 10).tolist())
    assert json.loads(results.read_text())["rows"][0]["exit_shares"] == [0.0, 0.0, 1.0]
    # at another point, by request
    assert validate.main([*common, "--device", "cpu", "--workers", "0", "--budget", "2"])[1].macs_fraction <= 2
    (tmp_path / "pictures" / "4").rename(tmp_path / "pictures" / "whale")
    (tmp_path / "pictures" / "3").rename(tmp_path / "pictures" / "wren")
    (tmp_path / "pictures" / "more").mkdir()
    pictures(1)[0].save(tmp_path / "pictures" / "more" / "1.png")
    with pytest.raises(ee.DataError, match=r"6 folders .* are not the 5 classes"):
        validate.main([*common, "--device", "cpu", "--workers", "0"])
