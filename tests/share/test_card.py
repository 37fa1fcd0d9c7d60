"""The model card: it renders for every kind of base, the Hub reads it, its snippet runs, no number is invented."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from torch import Tensor, nn
from typer.testing import CliRunner

import ee_surgery as ee
from ee_surgery.cli import app
from ee_surgery.share import base as bases
from ee_surgery.share import card as cards
from ee_surgery.share import card_text
from ee_surgery.share.adapter import load_adapter
from ee_surgery.share.card import CardInfo, update_card, write_card
from ee_surgery.share.provenance import as_stated
from tests.hub_server import Hub
from tests.zoo import TEXTS, original

SAMPLES = 40
SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)
TRAINING = {
    "objective": "joint",
    "lr": 0.0125,
    "epochs": 3,
    "seconds": 12.5,
    "teach": "labels",
    "versions": {"accelerate": "1.15.0"},
    "resumed": None,
}


class Net(nn.Module):
    """Three blocks and a head: captured in no time."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 8, 16, 24)
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.ReLU()) for a, b in pairwise(widths))
        )
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 16, 16) -> logits (B, 5)."""
        return self.head(self.blocks(x).mean((2, 3)))


@cache
def base(name: str) -> nn.Module:
    """A base with fixed random weights: found by its name (timm) or not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "plain":
            return Net().eval()
        if name == "timm":
            return timm.create_model("test_resnet").eval()
        return original("hf-ViT") if name == "hf-image" else TEXTS[0].make().eval()


@cache
def shared(name: str) -> ee.EarlyExitModel:
    """Branches on that base, without anything measured; use `made`."""
    sizes = {"plain": 16, "timm": 64}
    sample = torch.randn(2, 3, sizes[name], sizes[name]) if name in sizes else None
    branched = ee.augment(base(name), 2, sample=sample)
    for parameter in branched.branches.parameters():  # answers of different samples should differ
        if parameter.ndim == 2:
            parameter.data.mul_(5)
    return branched


def data(branched: ee.EarlyExitModel, labelled: bool = True, seed: int = 1) -> list[Any]:
    """Random samples; labels are what the exits and the original answer by turns, mostly the original."""
    generator = torch.Generator().manual_seed(seed)
    x: dict[str, Tensor] = {}
    for name, tensor in branched.sample.items():
        shape = (SAMPLES, *tensor.shape[1:])
        x[name] = (
            torch.randn(shape, generator=generator)
            if tensor.is_floating_point()
            else torch.randint(1, int(tensor.max()) + 1, shape, generator=generator)
        )
    answers = branched.all_exits(x).argmax(-1)
    turns = (torch.arange(SAMPLES) % 8).clamp(max=len(answers) - 1)
    labels = answers[turns, torch.arange(SAMPLES)]
    return [{**x, "labels": labels} if labelled else x]


def made(name: str, state: str, labelled: bool = True) -> ee.EarlyExitModel:
    """The shared model of that base, `bare`, with a `frontier`, or with `everything`."""
    branched = shared(name)
    branched.frontier, branched.provenance = None, {}
    branched.operate(None)
    if state != "bare":
        frontier = ee.calibrate(branched, data(branched, labelled))
        if state == "everything":
            branched.operate(frontier[len(frontier) // 2])
            ee.evaluate(branched, data(branched, labelled, seed=2))
            branched.provenance["training"] = TRAINING
    return branched


def parts(folder: Path) -> dict[str, list[list[str]]]:
    """The tables of a card by the section they stand in, header and rows."""
    found: dict[str, list[list[str]]] = {}
    section = ""
    for line in (folder / "README.md").read_text().splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("| ") and not line.startswith("| ---"):
            found.setdefault(section, []).append([cell.strip() for cell in line.strip("|").split("|")])
    return found


@pytest.mark.parametrize("state", ["bare", "frontier", "everything"])
@pytest.mark.parametrize("name", ["plain", "timm", "hf-image", "hf-text"])
def test_a_card_renders_and_the_hubs_parsers_read_it(name: str, state: str, tmp_path: Path) -> None:
    branched = made(name, state)
    folder = branched.save_pretrained(tmp_path / "exits", license="apache-2.0", datasets=["cifar10", "user/data"])
    card = ModelCard.load(folder / "README.md")
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    assert card.data.library_name == "ee_surgery"
    assert card.data.license == "apache-2.0"
    assert card.data.datasets == ["cifar10", "user/data"]
    assert card.data.pipeline_tag == ("text" if name == "hf-text" else "image") + "-classification"
    library = {"plain": [], "timm": ["timm"]}.get(name, ["transformers"])
    assert card.data.tags == ["early-exit", *library, "ee_surgery"]
    named = name == "timm"  # the others have no name that anybody could load
    assert card.data.get("base_model") == ("timm/test_resnet.r160_in1k" if named else None)
    assert card.data.get("base_model_relation") == ("adapter" if named else None)
    results = card.data.eval_results
    assert (results is not None) == (state == "everything")
    if results is not None:
        index = eval_results_to_model_index("exits", results)
        assert card.data.to_dict()["model-index"] == index
        assert model_index_to_eval_results(index) == ("exits", results)
        measured = branched.provenance["evaluation"]
        values = {"accuracy": measured["accuracy"], "macs_fraction": measured["macs_fraction"]}
        assert {result.metric_type: result.metric_value for result in results} == values
    assert ("## Trade-offs" in card.text) == (folder / "assets/frontier.png").exists() == (state != "bare")
    assert ("## Training" in card.text) == (state == "everything")
    prose = re.sub(r"```.*?```|`[^`]*`", "", card.text, flags=re.DOTALL)
    assert not re.search(r"\bNone\b(?! is stored)|\bnan\b|\binf\b|\{\{|\}\}|\{%", prose)
    assert not list(folder.rglob("*.partial*"))


@pytest.mark.parametrize("state", ["bare", "frontier", "everything"])
@pytest.mark.parametrize("name", ["plain", "timm", "hf-image", "hf-text"])
def test_the_snippet_runs_as_pasted(
    name: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    branched = made(name, state)
    branched.save_pretrained(tmp_path / "user" / "name", repo_id="user/name")
    monkeypatch.chdir(tmp_path)  # where `user/name` is a folder, which a repository of that name would be copied to
    monkeypatch.setattr(bases, "make_model", lambda library, model_id, **options: base(name))
    (code,) = SNIPPET.findall((tmp_path / "user/name/README.md").read_text())
    assert 'from_pretrained("user/name"' in code
    namespace: dict[str, Any] = {} if name == "timm" else {"model": base(name)}
    exec(compile(code, "card", "exec"), namespace)
    loaded = namespace["branched"]
    assert loaded.exits == branched.exits
    assert namespace["output"].logits.shape[0] == 4
    assert "tensor(" in capsys.readouterr().out
    assert (loaded.operating_point is None) == (state == "bare")
    if state == "everything":
        assert loaded.operating_point == branched.operating_point


@pytest.mark.parametrize("labelled", [True, False], ids=["labelled", "unlabelled"])
def test_the_tables_say_what_the_folder_says(labelled: bool, tmp_path: Path) -> None:
    folder = made("plain", "everything", labelled).save_pretrained(tmp_path / "exits")
    config, _, frontier = load_adapter(folder)
    assert frontier is not None
    tables, point, measured = parts(folder), config.operating_point, config.provenance["evaluation"]
    assert point is not None
    kind = "accuracy" if labelled else "agreement with the original"
    assert tables["Measured"][0] == ["exit", "share of samples", f"their {kind}"]
    for row, share, accuracy in zip(
        tables["Measured"][1:], measured["exit_shares"], measured["exit_accuracies"], strict=True
    ):
        assert row[1:] == [f"{share:.2%}", "" if accuracy is None else f"{accuracy:.2%}"]
    for row, stone in zip(tables["Trade-offs"][1:], frontier.milestones(), strict=True):
        numbers = [stone.accuracy, stone.expected_accuracy, stone.macs_fraction]
        assert row == [*(f"{n:.2%}" for n in numbers), f"`{stone.score}`", *(f"{s:.2%}" for s in stone.exit_shares)]
    exits = tables["Exits"][1:]
    assert [row[0] for row in exits] == [f"`{name}`" for name in frontier.exits]
    for row, exit in zip(exits, config.exits, strict=False):
        assert row[1] == "x".join(map(str, exit.shape))
        assert row[3:5] == [f"{exit.trunk_macs / config.base_macs:.2%}", f"{exit.branch_macs:,}"]
    assert [row[5] for row in exits] == [f"{accuracy:.2%}" for accuracy in frontier.exit_accuracies]
    rows = {row[0]: row[1] for row in tables["Operating point"]}
    assert rows[kind] == f"{point.accuracy:.2%}"
    assert [float(t.replace("closed", "inf")) for t in rows["thresholds"].split(", ")] == pytest.approx(
        point.thresholds, rel=1e-5
    )
    assert dict(tables["Training"][1:]) == {
        "objective": "joint",
        "lr": "0.0125",
        "epochs": "3",
        "seconds": "12.5",
        "teach": "labels",
        "versions": "accelerate 1.15.0",
    }
    text = (folder / "README.md").read_text()
    assert f"on {measured['samples']} samples" in text
    assert f"`{config.base.fingerprint}`" in text
    assert f"Receipt when this was saved: {config.provenance['receipt']}." in text
    assert "unchanged: all 8 parameters" in text


def _numbers(value: object) -> Iterator[float]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _numbers(item)
    elif isinstance(value, (list, tuple)):
        yield len(value)
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
    elif isinstance(value, str):
        yield from map(float, re.findall(r"\d+(?:\.\d+)?", value))


@pytest.mark.parametrize("state", ["bare", "frontier", "everything"])
@pytest.mark.parametrize("name", ["plain", "hf-text"])
def test_no_number_is_in_the_card_that_is_not_in_the_folder(name: str, state: str, tmp_path: Path) -> None:
    folder = made(name, state).save_pretrained(tmp_path / "exits", eval_split="test")
    config = json.loads((folder / "config.json").read_text())
    sources: list[object] = [config, *(json.loads(p.read_text()) for p in folder.glob("frontier.json"))]
    known = [n for source in sources for n in _numbers(source) if math.isfinite(n)]
    known += [exit["trunk_macs"] / config["base_macs"] for exit in config["exits"]] + [1.0]
    # Every way in which a number may be written; names in backticks, code and the plot are no numbers.
    said = {
        form
        for n in known
        for form in (f"{n:.2%}", f"{n:,}", f"{n:,.0f}", f"{n:g}", f"{n:.6g}", f"{n:.3f}", f"{100 * n:.2f}")
    }
    text = ModelCard.load(folder / "README.md").text
    prose = re.sub(r"```.*?```|`[^`]*`|SHA-256|<!--.*?-->|!\[.*?\)|Versions: .*", "", text, flags=re.DOTALL)
    written = re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?%?(?![\w])", prose.replace("x", " "))
    assert len(written) > 4
    assert [number for number in written if number.rstrip(",") not in said] == []


def test_what_was_not_measured_is_not_there(tmp_path: Path) -> None:
    branched = made("plain", "bare")
    text = (branched.save_pretrained(tmp_path / "a") / "README.md").read_text()
    for word in ("## Measured", "## Trade-offs", "## Training", "model-index", "accuracy", "calibration samples"):
        assert word not in text
    branched.operate(thresholds=0.9)
    folder = branched.save_pretrained(tmp_path / "b")
    rows = {row[0]: row[1] for row in parts(folder)["Operating point"]}
    assert rows == {
        "": "",
        "score": "`max_prob`",
        "thresholds": "0.9, 0.9",
        "fallback for samples that never exit early": "the last exit",
    }
    assert "Rule: `by hand`." in (folder / "README.md").read_text()


def test_an_evaluation_of_another_operating_point_is_left_out(tmp_path: Path) -> None:
    branched = made("plain", "everything")
    branched.operate(thresholds=0.5)
    with pytest.warns(UserWarning, match="different operating point"):
        folder = branched.save_pretrained(tmp_path / "exits")
    assert "## Measured" not in (folder / "README.md").read_text()
    assert ModelCard.load(folder / "README.md").data.eval_results is None
    ee.evaluate(branched, data(branched))
    assert "## Measured" in (branched.save_pretrained(folder) / "README.md").read_text()
    with branched.exits_disabled():  # the original was evaluated, not what is stored
        ee.evaluate(branched, data(branched))
    with pytest.warns(UserWarning, match="different operating point"):
        branched.save_pretrained(folder)


def test_agreement_is_not_called_accuracy(tmp_path: Path) -> None:
    folder = made("plain", "everything", labelled=False).save_pretrained(
        tmp_path / "exits", eval_dataset="user/data", eval_task="default"
    )
    results = ModelCard.load(folder / "README.md").data.eval_results
    assert results is not None
    assert [result.metric_type for result in results] == ["agreement", "macs_fraction"]
    assert not (folder / ".eval_results").exists()


def test_the_measured_accuracy_goes_to_the_benchmark_that_is_named(tmp_path: Path) -> None:
    branched = made("plain", "everything")
    about = {"eval_dataset": "user/data", "eval_name": "Data | of <mine>", "eval_split": "test"}
    folder = branched.save_pretrained(tmp_path / "exits", **about)
    file = folder / ".eval_results" / "ee_surgery.yaml"
    assert not file.exists()  # a task has to be named as well
    branched.save_pretrained(folder, eval_task="default")
    (entry,) = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    measured = branched.provenance["evaluation"]
    assert (entry.dataset_id, entry.task_id, entry.value) == ("user/data", "default", measured["accuracy"])
    results = ModelCard.load(folder / "README.md").data.eval_results
    assert results is not None
    assert {(r.dataset_type, r.dataset_name, r.dataset_split) for r in results} == {
        ("user/data", "Data | of <mine>", "test")
    }
    del branched.provenance["evaluation"]
    branched.save_pretrained(folder)
    assert not file.exists()


def test_a_certificate_is_stated(tmp_path: Path) -> None:
    branched = made("plain", "frontier")
    point = branched.operate(risk=(0.9, 0.2))
    assert point is not None
    assert point.certificate is not None
    folder = branched.save_pretrained(tmp_path / "exits")
    assert (f"Certificate: {point.certificate}." in (folder / "README.md").read_text()) == point.certificate.certified


BAD = [
    ({"licence": "mit"}, "has no field 'licence'. Did you mean 'license'.*eval_split"),
    ({"license": 3}, "license of a model card must be text, got 3"),
    ({"datasets": ["cifar10", 5]}, "text or a list of it"),
    ({"tags": ["a\nb"]}, "tags of a model card"),
    ({"license": ["mit"]}, "license of a model card must be text, got"),
    ({"repo_id": "a/b/c"}, "repo_id of a model card: 'a/b/c' is not a valid Hub id"),
    ({"datasets": ["no good"]}, "'no good' is not a valid Hub id"),
    ({"eval_task": "default"}, "eval_dataset="),
]


@pytest.mark.parametrize(("about", "message"), BAD)
def test_bad_keywords_are_named_before_anything_is_written(about: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ee.ConfigError, match=f"(?s){message}"):
        made("plain", "bare").save_pretrained(tmp_path / "exits", **about)
    assert not (tmp_path / "exits").exists()


def test_a_readme_of_somebody_else_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "exits"
    folder.mkdir()
    (folder / "README.md").write_text("# My own words\n")
    with pytest.warns(UserWarning, match="kept"):
        made("plain", "bare").save_pretrained(folder)
    assert (folder / "README.md").read_text() == "# My own words\n"
    (folder / "README.md").unlink()
    text = (made("plain", "bare").save_pretrained(folder) / "README.md").read_text()
    (folder / "README.md").write_text(text.replace(cards.MARKER, "Mine now."))
    with pytest.warns(UserWarning, match="kept"):
        made("plain", "frontier").save_pretrained(folder)
    assert "Mine now." in (folder / "README.md").read_text()


def test_what_the_card_was_told_is_kept_for_the_next_one(tmp_path: Path) -> None:
    folder = made("plain", "everything").save_pretrained(tmp_path / "exits", license="mit", tags="cifar")
    again = ee.from_pretrained(folder, base("plain"))
    again.save_pretrained(folder)
    told = ModelCard.load(folder / "README.md").data
    assert (told.license, told.tags) == ("mit", ["early-exit", "ee_surgery", "cifar"])
    again.save_pretrained(folder, license=None, language="en")
    card = ModelCard.load(folder / "README.md").data
    assert (card.license, card.language, card.tags) == (None, ["en"], ["early-exit", "ee_surgery", "cifar"])


def test_numbers_that_were_loaded_are_their_authors_until_they_are_measured_again(tmp_path: Path) -> None:
    about = {"license": "mit", "repo_id": "user/first", "eval_dataset": "user/data", "eval_name": "Data",
             "eval_split": "test", "eval_task": "default"}  # fmt: skip
    made("plain", "everything").save_pretrained(tmp_path / "theirs", **about)
    loaded = ee.from_pretrained(tmp_path / "theirs", base("plain"))
    assert loaded.provenance["loaded_from"] == "theirs"
    assert loaded.provenance["card"] == {"license": "mit"}
    mine = loaded.save_pretrained(tmp_path / "mine", eval_dataset="my/data", eval_task="default")
    card = ModelCard.load(mine / "README.md")
    assert card.data.eval_results is None
    assert card.data.get("model-index") is None
    assert not (mine / ".eval_results").exists()
    assert "## Stated, not measured\n\nStated by theirs; not measured again since." in card.text
    assert "## Trade-offs\n\nStated by theirs; not calibrated again since." in card.text
    assert "## Operating point\n\nStated by theirs; not calibrated again since." in card.text
    assert "## Training\n\nStated by theirs; not trained again since." in card.text
    assert "(data set not named)" in card.text
    assert "my/data" not in card.text
    assert "stated" not in "".join(row[0] for row in parts(mine)["Training"])
    again = ee.from_pretrained(mine, base("plain"))  # and then by another
    text = (again.save_pretrained(tmp_path / "third") / "README.md").read_text()
    assert "Stated by theirs, and loaded from mine; not measured again since." in text


def test_what_is_done_again_is_ones_own(tmp_path: Path) -> None:
    made("plain", "everything").save_pretrained(tmp_path / "theirs")
    loaded = ee.from_pretrained(tmp_path / "theirs", base("plain"))
    assert loaded.provenance["evaluation"]["stated_by"] == "theirs"
    frontier = ee.calibrate(loaded, data(loaded))
    loaded.operate(frontier[len(frontier) // 2])
    ee.evaluate(loaded, data(loaded))
    folder = loaded.save_pretrained(tmp_path / "mine", eval_dataset="my/data", eval_task="default")
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results is not None
    assert (folder / ".eval_results").exists()
    assert "## Measured" in card.text
    assert card.text.count("Stated by") == 1
    assert "Stated by theirs; not trained again since." in card.text
    ee.train(loaded, data(loaded), ee.TrainConfig(epochs=1, progress=False, validation=0))
    assert "calibration" not in loaded.provenance
    assert "Stated by" not in (loaded.save_pretrained(folder) / "README.md").read_text()


@pytest.mark.parametrize("found", [3, [], "text", {"accuracy": "99 %"}, {"stated_by": 5}, {"stated_by": " "}])
def test_provenance_of_any_shape_is_taken_as_stated(found: Any) -> None:
    names = ("evaluation", "training", "calibration", "card", "loaded_from")
    taken = as_stated(dict.fromkeys(names, found), "user/name", calibrated=True)
    assert taken["loaded_from"] == "user/name"
    assert taken["calibration"]["stated_by"] == "user/name"
    assert taken["evaluation"].get("stated_by", "user/name") == "user/name"
    assert "card" not in taken
    assert "calibration" not in as_stated(dict.fromkeys(names, found), "user/name", calibrated=False)


def test_an_evaluation_that_is_damaged_is_left_out_of_the_card(tmp_path: Path) -> None:
    folder = made("plain", "everything").save_pretrained(tmp_path / "exits")
    config, _, _ = load_adapter(folder)
    damage = [("accuracy", "99 %"), ("accuracy", 99.99), ("macs_fraction", math.nan), ("macs_fraction", 10**400),
              ("samples", -1), ("samples", "many"), ("labelled", 1), ("exits", "abc"), ("exit_shares", [0.5]),
              ("exit_accuracies", [2, 2, 2])]  # fmt: skip
    for key, value in damage:
        write_card(folder, config, None)
        assert "## Measured" in (folder / "README.md").read_text()
        evaluation = {**config.provenance["evaluation"], key: value}
        with pytest.warns(ee.SurgeryWarning, match="damaged"):
            write_card(folder, replace(config, provenance={"evaluation": evaluation}), None)
        assert "## Measured" not in (folder / "README.md").read_text()


def test_the_folder_alone_gives_the_same_card(tmp_path: Path) -> None:
    folder = made("plain", "everything").save_pretrained(tmp_path / "exits", license="mit")
    text = (folder / "README.md").read_text()
    (folder / "README.md").unlink()
    update_card(folder)
    assert (folder / "README.md").read_text() == text
    update_card(folder, license="apache-2.0", repo_id="user/name")
    assert ModelCard.load(folder / "README.md").data.license == "apache-2.0"
    config, _, _ = load_adapter(folder)
    assert config.provenance["card"] == {"license": "apache-2.0", "repo_id": "user/name"}
    (folder / "README.md").unlink()
    write_card(folder, config, None)  # no receipt was given: none is stated
    assert "Receipt" not in (folder / "README.md").read_text()


def test_a_card_that_fails_leaves_the_adapter_and_the_old_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    branched = made("plain", "bare")
    folder = branched.save_pretrained(tmp_path / "exits")
    text = (folder / "README.md").read_text()

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    branched.frontier = ee.calibrate(branched, data(branched))
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(ee.AdapterError, match="No space"):
        branched.save_pretrained(folder, license="mit")
    assert not list(folder.rglob("*.partial*"))
    assert (folder / "README.md").read_text() == text
    assert ee.from_pretrained(folder, base("plain")).exits == branched.exits


def test_without_matplotlib_there_is_no_plot_and_no_link_to_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    branched = made("plain", "frontier")
    folder = branched.save_pretrained(tmp_path / "exits")
    assert "(assets/frontier.png)" in (folder / "README.md").read_text()
    monkeypatch.setattr(cards.importlib.util, "find_spec", lambda name: None)
    text = (branched.save_pretrained(folder) / "README.md").read_text()
    assert "## Trade-offs" in text
    assert "frontier.png" not in text
    assert not (folder / "assets/frontier.png").exists()


def test_words_from_elsewhere_stay_in_their_cell(tmp_path: Path) -> None:
    branched = made("plain", "bare")
    branched.provenance["training"] = {"note": "a | b\n\n<script>", "list": [1, 2], "{{ 7 * 7 }}": True}
    folder = branched.save_pretrained(tmp_path / "exits")
    text = (folder / "README.md").read_text()
    assert "| note | `a \\| b\\n\\n<script>` |" in text
    assert "| list | 1, 2 |" in text
    assert "| `{{ 7 * 7 }}` | true |" in text


def test_a_base_of_its_own_is_a_finetune_that_says_so(tmp_path: Path) -> None:
    branched = shared("timm").copy()
    branched.rebase()
    folder = branched.save_pretrained(tmp_path / "exits")
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model_relation == "finetune"
    assert "stored here" in card.text


def test_a_timm_model_with_a_head_of_its_own_has_to_be_passed(tmp_path: Path) -> None:
    branched = ee.augment(timm.create_model("test_resnet", num_classes=5), 1, sample=torch.randn(2, 3, 64, 64))
    card = ModelCard.load(branched.save_pretrained(tmp_path / "exits") / "README.md")
    assert "model=model)" in card.text  # fine-tuned: timm has no weights of that shape
    assert card.data.base_model is None


def test_a_move_to_another_base_is_told_and_drops_what_was_measured(tmp_path: Path) -> None:
    folder = made("plain", "everything").save_pretrained(tmp_path / "exits")
    fingerprint = load_adapter(folder)[0].base.fingerprint
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match="other_base"):
        moved = ee.from_pretrained(folder, Net().eval(), other_base=True)
    text = (moved.save_pretrained(folder) / "README.md").read_text()
    assert f"trained on a base with fingerprint `{fingerprint}`" in text
    assert "## Measured" not in text


def test_known_keywords_are_described() -> None:
    assert CardInfo.of({"tags": "one", "license": None}) == CardInfo(tags=("one",))
    for name in CardInfo.__dataclass_fields__:
        assert f"`{name}`" in (ee.EarlyExitModel.save_pretrained.__doc__ or ""), name


# --- the command line


def _run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output + str(result.exception)
    return result.output


def test_the_card_command_needs_no_base(tmp_path: Path) -> None:
    folder = made("plain", "frontier").save_pretrained(tmp_path / "exits")
    out = _run("card", str(folder), "--license", "mit", "--dataset", "cifar10", "--dataset", "user/data")
    assert "README.md" in out
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.datasets) == ("mit", ["cifar10", "user/data"])
    assert "not a valid Hub id" in _run("card", str(folder), "--repo-id", "a b", code=1)
    assert "No adapter folder" in _run("card", str(tmp_path / "none"), code=1)


def test_inspect_shows_the_exits_of_an_adapter(tmp_path: Path) -> None:
    branched = made("plain", "frontier")
    out = _run("inspect", str(branched.save_pretrained(tmp_path / "exits")))
    assert all(name in out for name in branched.exits)
    assert "no sample leaves early" in out
    (tmp_path / "empty").mkdir()
    assert "Cannot create" in _run("inspect", str(tmp_path / "empty"), code=1)


def test_push_and_pull_through_the_hub(hub: Hub, tmp_path: Path) -> None:
    branched = made("plain", "frontier")
    folder = branched.save_pretrained(tmp_path / "exits")
    _run("push", str(folder), "user/name", "--private", "--message", "First")
    files = hub.files("user/name")
    assert {"README.md", "config.json", "assets/frontier.png"} <= set(files)
    assert 'from_pretrained("user/name"' in files["README.md"].decode()
    out = _run("pull", "user/name", "--out", str(tmp_path / "copy"))
    assert all(name in out for name in branched.exits)
    assert ee.from_pretrained(tmp_path / "copy", base("plain")).exits == branched.exits
    assert not list(tmp_path.glob("*.partial"))
    assert "already exists" in _run("pull", "user/name", "--out", str(tmp_path / "copy"), code=1)
    assert branched.exits[0] in _run("inspect", "user/name")  # an adapter, by its name on the Hub
    assert "HubError" in _run("pull", "user/nothing", code=1)
    assert "No adapter folder" in _run("push", str(tmp_path / "none"), "user/other", code=1)


def test_push_to_hub_names_the_repository_in_the_card(hub: Hub) -> None:
    made("plain", "bare").push_to_hub("user/name", license="mit")
    readme = hub.files("user/name")["README.md"].decode()
    assert 'from_pretrained("user/name"' in readme
    assert ModelCard(readme).data.license == "mit"


@pytest.mark.parametrize(
    "damaged",
    [3, {}, {"candidates": 3}, {"candidates": [3, {}, {"exit": "a"}, {"exit": 3, "accuracy": 0.5, "cost": 0.5}]}],
)
def test_a_damaged_search_leaves_no_trace_on_the_card(damaged: object) -> None:
    assert card_text.search({"placement": damaged, "effort": 3}) is None


def test_a_search_on_the_card_is_escaped() -> None:
    candidate = {"exit": "a|`b`", "branch": "<img>", "options": {"x": "[y](z)", "n": ""}, "accuracy": 0.5, "cost": 0.25}
    found = {"candidates": [candidate, {**candidate, "chosen": True}], "left_out": ["a|`b`", 3]}
    shown = card_text.search({"placement": found})
    assert shown is not None
    table = str(shown["table"])
    assert [line.count("|") - line.count("\\|") for line in table.splitlines()] == [6] * 4
    assert "<img>" not in table.replace("`<img> x=[y](z)`", "")
    assert table.count("costs more than it saves") == 1
    assert table.count("not chosen") == 1
