"""One ONNX file: the exits of the routed run, at any batch size and thresholds, without torch."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import ee_surgery as ee
from ee_surgery import check_export
from ee_surgery.policies.operating_point import OperatingPoint
from recipes.networks import CifarResNet
from tests import ROOT
from tests.zoo import BY_NAME, POLICIES, SPECIAL, two_exits

onnx = pytest.importorskip("onnx", reason="needs ee-surgery[onnx]")
pytest.importorskip("onnxruntime", reason="needs ee-surgery[onnx]")

from ee_surgery.export import writers  # noqa: E402
from ee_surgery.export.compose import to_onnx  # noqa: E402
from ee_surgery.export.parts import Piece  # noqa: E402
from ee_surgery.graph.batch_axes import Axis  # noqa: E402
from ee_surgery.onnx import (  # noqa: E402
    METADATA,
    OnnxError,
    OnnxModel,
    OpenVinoModel,
    StagedModel,
    on_onnxruntime,
    on_openvino,
    one_file,
)

INF = math.inf


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ee.EarlyExitModel, Path]:
    model = two_exits()
    labels = torch.randint(10, (64,))
    ee.calibrate(model, [(torch.randn(64, 3, 16, 16), labels)])
    model.operate(budget=0.9)
    return model, model.export(tmp_path_factory.mktemp("onnx") / "model.onnx")


@pytest.fixture(scope="module")
def staged(made: tuple[ee.EarlyExitModel, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made[0].export(tmp_path_factory.mktemp("onnx") / "stages", layout="stages")


@given(st.integers(1, 70), st.lists(st.floats(0.1, 0.3) | st.just(INF), min_size=2, max_size=2))
def test_stages_routed_in_numpy_are_the_file(
    made: tuple[ee.EarlyExitModel, Path], staged: Path, batch: int, thresholds: list[float]
) -> None:
    x = torch.randn(batch, 3, 16, 16).numpy()
    file, folder = OnnxModel(made[1], threads=1), StagedModel(staged)
    for one, other in zip(file.run(x, thresholds), folder.run(x, thresholds), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@given(st.sampled_from([1, 2, 5, 33]), st.lists(st.floats(0.1, 0.3) | st.just(INF), min_size=2, max_size=2))
def test_openvino_runs_the_file_and_the_stages(
    made: tuple[ee.EarlyExitModel, Path], staged: Path, in_openvino: OpenVinoModel, batch: int, thresholds: list[float]
) -> None:
    x = torch.randn(batch, 3, 16, 16).numpy()
    file, folder = OnnxModel(made[1], threads=1), StagedModel(staged, partial(on_openvino, threads=1))
    expected = file.run(x, thresholds)
    for other in (in_openvino.run(x, thresholds), folder.run(x, thresholds)):
        for one, theirs in zip(expected, other, strict=True):
            np.testing.assert_allclose(one, theirs, atol=1e-5)
    assert in_openvino.about == file.about
    np.testing.assert_allclose(in_openvino.run(x).logits, file.run(x).logits, atol=1e-5)


def test_an_openvino_that_gives_wrong_rows_is_refused(
    made: tuple[ee.EarlyExitModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_file, "openvino_version", lambda: (2026, 0))
    with pytest.raises(OnnxError, match=r"2026\.0 gives wrong rows"):
        OpenVinoModel(made[1])


@pytest.fixture(scope="module")
def in_openvino(made: tuple[ee.EarlyExitModel, Path]) -> OpenVinoModel:
    pytest.importorskip("openvino", reason="needs ee-surgery[openvino]")
    return OpenVinoModel(made[1], threads=1)


@given(st.integers(1, 70), st.lists(st.floats(0.1, 0.3) | st.just(INF), min_size=2, max_size=2), st.integers(0, 99))
def test_every_sample_leaves_where_the_routed_run_lets_it(
    made: tuple[ee.EarlyExitModel, Path], batch: int, thresholds: list[float], seed: int
) -> None:
    model, path = made
    x = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    model.operate(thresholds=thresholds)
    found = check_export(path, model, [x])
    assert (found.samples, found.exits) == (batch, 0)
    assert found.logits < 1e-5
    own, theirs = model.predict(x), OnnxModel(path, threads=1).run(x.numpy(), thresholds)
    if not found.ties:
        assert np.array_equal(theirs.macs, own.macs.numpy())
        np.testing.assert_allclose(theirs.score, own.score.numpy(), atol=1e-5)


@pytest.mark.parametrize("layout", ["file", "stages"])
def test_weights_beyond_one_file_are_beside_it(
    made: tuple[ee.EarlyExitModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setattr(writers, "_EMBEDDED", 0)
    model, inside = made
    model.operate(budget=0.9)
    x = torch.randn(9, 3, 16, 16).numpy()
    path = tmp_path / "model.onnx"
    for _ in range(2 if layout == "file" else 1):  # the second takes the place of the first
        model.export(path, layout=layout)
        own = OnnxModel(path) if layout == "file" else StagedModel(path)
        expected = OnnxModel(inside).run(x, own.about["thresholds"])
        np.testing.assert_allclose(own.run(x).logits, expected.logits, atol=1e-5)
    files = sorted(each.name for each in (tmp_path if layout == "file" else path).iterdir())
    if layout == "stages":
        assert files.count("stage_0.onnx") == files.count("stage_0.weights") == 1
        return
    assert re.fullmatch(r"model.onnx model.onnx.[0-9a-f]{8}.weights", " ".join(files))
    assert writers._bytes(model.engine) == sum(t.nbytes for t in model.state_dict().values() if t.is_floating_point())
    with monkeypatch.context() as context:
        context.setattr(writers.os, "fsync", Mock(side_effect=OSError("full")))
        with pytest.raises(ee.WriteError, match="full"):
            model.export(path)
    assert sorted(each.name for each in tmp_path.iterdir()) == files  # nothing of a failed export is left
    monkeypatch.undo()
    model.export(path)
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


def test_the_operating_point_is_the_default_of_the_input_and_the_frontier_goes_along(
    made: tuple[ee.EarlyExitModel, Path],
) -> None:
    model, path = made
    x = torch.randn(32, 3, 16, 16)
    point = model.operate(budget=0.9)
    assert point is not None
    file = OnnxModel(path, threads=1)
    default = file.session.run(None, {file.inputs[0]: x.numpy()})
    assert np.array_equal(default[1], file.run(x.numpy(), point.thresholds).exit_index)
    assert file.exits == [*model.exits, "original"]
    assert model.frontier is not None
    assert file.operate(max_accuracy_drop=1.0) == model.frontier.at(max_accuracy_drop=1.0).thresholds
    assert file.operate(budget=0.9) == model.frontier.at(budget=0.9).thresholds
    assert file.operate(thresholds=[INF, INF]) == (INF, INF)
    assert set(file.run(x.numpy()).exit_index) == {2}
    assert file.operate() is None
    for wrong in ({"budget": 0.0001}, {"thresholds": [0.5]}, {"thresholds": [0.5, math.nan]}):
        with pytest.raises(OnnxError):
            file.operate(**wrong)
    with pytest.raises(OnnxError, match="one of"):
        file.operate(budget=1.0, max_accuracy_drop=0.0)
    with pytest.raises(OnnxError, match="cannot run"):
        file.run(np.zeros((1, 4, 16, 16), np.float32))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("branch", "score", "fallback", "confidence"),
    POLICIES,
)
def test_scores_with_state_chains_and_fallbacks_go_into_the_file(
    branch: str, score: str, fallback: str, confidence: bool, tmp_path: Path
) -> None:
    model = two_exits(branch, confidence)
    point = OperatingPoint.by_hand([INF, INF], score, 2)
    model.operate(replace(point, fallback=fallback))
    paths = [model.export(tmp_path / layout, layout=layout) for layout in ("file", "stages")]
    for path, batch in product(paths, (1, 5, 40)):
        x = torch.randn(batch, 3, 16, 16)
        for thresholds in ((0.5, INF), (INF, 0.5), (0.11, 0.12), (INF, INF), (-INF, INF)):
            model.operate(replace(point, thresholds=thresholds, fallback=fallback))
            found = check_export(path, model, [x])
            assert (found.exits, found.logits < 1e-5) == (0, True)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["eenet", "classwise", "scaled", "stopping"])
def test_fitted_scores_go_into_the_file(method: str, tmp_path: Path) -> None:
    model = two_exits()
    x, labels = torch.randn(96, 3, 16, 16), torch.randint(10, (96,))
    frontier = ee.calibrate(model, [(x, labels)], method=method)
    model.operate(frontier[len(frontier) // 2])
    path = model.export(tmp_path / "model.onnx")
    found = check_export(path, model, [x])
    assert (found.exits, found.logits < 1e-5) == (0, True)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((1, 2, 3, 7, 8, 31, 64, 65, 257), id="some"),
        pytest.param(range(1, 258), id="all", marks=pytest.mark.slow),
    ],
)
def test_no_sample_depends_on_the_batch_around_it(made: tuple[ee.EarlyExitModel, Path], sizes: Sequence[int]) -> None:
    model, path = made
    x = torch.randn(257, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    file = OnnxModel(path, threads=1)
    model.operate(thresholds=[-INF, INF])
    first = np.sort(model.predict(x).score.numpy())
    own = file.about["thresholds"]
    # left out; no samples go on from the first exit, one does, most do; all go to the end
    for thresholds in (
        None,
        [-INF, INF],
        [float(first[:2].mean()), INF],
        [float(first[-3:-1].mean()), INF],
        [INF, INF],
    ):
        model.operate(thresholds=own if thresholds is None else thresholds)
        whole = model.predict(x)
        for size in sizes:
            rows = [*range(256, 256 - size, -1)]  # the one that goes on alone is in some of them
            answer = file.run(x[rows].numpy(), thresholds)
            assert np.array_equal(answer.exit_index, whole.exit_index[rows].numpy()), (size, thresholds)
            np.testing.assert_allclose(answer.logits, whole.logits[rows].numpy(), atol=1e-5)


def test_a_sample_that_is_not_finite_never_leaves_early(made: tuple[ee.EarlyExitModel, Path]) -> None:
    x = torch.randn(3, 3, 16, 16)
    x[1] = torch.nan
    assert OnnxModel(made[1]).run(x.numpy(), [-INF, -INF]).exit_index.tolist() == [0, 2, 0]


def test_it_runs_without_torch(made: tuple[ee.EarlyExitModel, Path]) -> None:
    program = (
        "import sys, numpy as np; from ee_surgery.onnx import OnnxModel; m = OnnxModel(sys.argv[1]);"
        "print(m.run(np.zeros((2, 3, 16, 16), np.float32)).logits.shape);"
        "assert not {'torch', 'timm', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(made[1])], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "(2, 10)"), done.stderr


@pytest.mark.parametrize(
    "edit",
    [
        {"format_version": 2},
        {"exits": ["a"]},
        {"thresholds": []},
        {"points": [{"thresholds": [1]}]},
        {"branch_macs": None},
    ],
)
def test_damaged_metadata_is_refused(
    made: tuple[ee.EarlyExitModel, Path], edit: dict[str, object], tmp_path: Path
) -> None:
    model = onnx.load(made[1])
    about = json.loads({prop.key: prop.value for prop in model.metadata_props}[METADATA])
    onnx.helper.set_model_props(model, {METADATA: json.dumps({**about, **edit})})
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(OnnxError, match=r"other\.onnx"):
        OnnxModel(tmp_path / "other.onnx")


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("nothing")
    for name in ("text.onnx", "missing.onnx"):
        with pytest.raises(OnnxError, match=name):
            OnnxModel(tmp_path / name)


def test_branches_in_train_mode_are_exported_as_they_answer(tmp_path: Path) -> None:
    model = two_exits("conv2")
    model.train()
    path = model.export(tmp_path / "model.onnx")
    assert all(module.training for module in model.branches.modules())
    model.eval()
    model.operate(thresholds=[0.12, 0.12])
    assert check_export(path, model, [torch.randn(16, 3, 16, 16)]).exits == 0


@pytest.mark.parametrize("text", ["[]", "{}", '{"format_version": "' + "9" * 1000 + '"}', "{" * 5000])
def test_a_damaged_folder_of_stages_is_refused_in_few_words(text: str, tmp_path: Path) -> None:
    (tmp_path / "router.json").write_text(text)
    with pytest.raises(OnnxError, match=r"router\.json") as caught:
        StagedModel(tmp_path)
    assert len(str(caught.value)) < 600


def test_bfloat16_is_refused(tmp_path: Path) -> None:
    model = two_exits().to(torch.bfloat16)
    with pytest.raises(ee.ConfigError, match="bfloat16"):
        model.export(tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_vit", "hf-Swin"])
def test_tokens_and_windows_go_into_the_file(name: str, tmp_path: Path) -> None:
    entry = BY_NAME[name]
    model = ee.augment(entry.make(), 3, sample=entry.sample(4))
    path = model.export(tmp_path / "model.onnx")
    model.operate(thresholds=0.5)
    assert check_export(path, model, [entry.sample(5)]).exits == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilevit", "hf-DistilBertForSequenceClassification"])
def test_folded_batches_and_texts_go_into_the_file(name: str, tmp_path: Path) -> None:
    model = next(special for special in SPECIAL if special.name == name).augment(3)
    path = model.export(tmp_path / "model.onnx")
    model.operate(thresholds=0.5)
    assert check_export(path, model, [model.sample]).exits == 0


@pytest.mark.slow
def test_shortcuts_go_into_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CifarResNet(20).eval()
    branch = ee.BranchSpec("shortcut", options={"budget": 0.9})
    branched = ee.augment(model, ["layer1.0", "layer2.0"], branch=branch, sample=torch.randn(4, 3, 32, 32))
    path = branched.export(tmp_path / "model.onnx")
    branched.operate(thresholds=[0.13, 0.13])
    assert check_export(path, branched, [torch.randn(24, 3, 32, 32)]).exits == 0


@pytest.mark.slow
def test_several_labels_and_fitted_scores_of_a_loaded_model_go_into_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, tags = torch.randn(64, 3, 16, 16), (torch.rand(64, 10) < 0.3).float()
    base = CifarResNet(8).eval()
    model = ee.augment(base, 2, branch="pool", task="multi_label", sample=x[:4])
    frontier = ee.calibrate(model, [(x, tags)], method="scaled")
    model.operate(frontier[len(frontier) // 2])
    again = ee.from_pretrained(model.save_pretrained(tmp_path / "adapter"), base)
    path = again.export(tmp_path / "model.onnx")
    assert check_export(path, again, [x]).exits == 0
    assert len(OnnxModel(path).points) == len(
        [point for point in frontier if str(point.score) == str(frontier[len(frontier) // 2].score)]
    )


class Attention(torch.nn.Module):
    """Attention over three dimensions, then over five, with masks that are broadcast."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims, self.proj = dims, torch.nn.Linear(8, 8)
        self.register_buffer("mask", torch.rand(*[1] * (dims - 2), 16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.proj(x).view(x.shape[0], *[1] * (self.dims - 3), 16, 8)
        mask: torch.Tensor = self.mask  # pyright: ignore[reportAssignmentType]
        y = torch.nn.functional.scaled_dot_product_attention(y, y, y, attn_mask=mask)
        return x + y.reshape(x.shape[0], 16, 8)


class Attentions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = (
            torch.nn.Linear(3, 8),
            torch.nn.ModuleList(map(Attention, (3, 5))),
            torch.nn.Linear(8, 5),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x.flatten(2).transpose(1, 2))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def test_attention_over_other_dimensions_than_four_is_folded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ee.augment(Attentions().eval(), ["blocks.0"], sample=torch.randn(4, 3, 4, 4))
    x = torch.randn(9, 3, 4, 4)
    model.operate(thresholds=model.all_exits(x)[0].softmax(1).amax(1).median().item())
    found = check_export(model.export(tmp_path / "model.onnx"), model, [x])
    assert (found.samples, found.exits) == (9, 0)


class _Masked(nn.Module):
    def forward(self, *tensors: Tensor) -> Tensor:
        return tensors[0] * torch.ops.aten._is_all_true(torch.ones(3) > 0) + torch.ops.aten._is_all_true(tensors[1])


def test_a_check_of_masks_that_torch_onnx_lacks_is_translated(tmp_path: Path) -> None:
    x, mask = torch.randn(4, 3), torch.ones(3, dtype=torch.bool)
    piece = Piece("stage_0", _Masked(), (x, mask), (Axis(0), None), (x,))
    onnx.save_model(to_onnx(piece, ["x", "mask"], ["y"]), tmp_path / "model.onnx")
    run = on_onnxruntime(str(tmp_path / "model.onnx"))
    for seen in (mask, torch.tensor([True, False, True])):
        (y,) = run([x.numpy(), seen.numpy()])
        np.testing.assert_allclose(y, x + float(seen.all()))
