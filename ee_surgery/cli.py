"""`ee-surgery`: one sub-command per step, each a call of a public function.

torch and what needs it are imported where a command runs, so that `--help` and wrong arguments answer at once.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console
from rich.progress import track

import ee_surgery as ee
from ee_surgery import names
from ee_surgery.names import AlarmAction, EffortName, Precision, TrainPrecision
from ee_surgery.text import paragraph, plain, visible

if TYPE_CHECKING:
    from torch import nn

_TIMM_SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()

_NAMES = "timm model name (also `hf-hub:user/name`, `local-dir:folder`), or Hugging Face id or folder"
Model = Annotated[str, typer.Argument(help=f"{_NAMES}.")]
Seen = Annotated[str, typer.Argument(help=f"{_NAMES}, of a model or an adapter.")]
Adapter = Annotated[Path, typer.Argument(help="Adapter folder that `augment` wrote.")]
Weights = Annotated[
    str,
    typer.Option(help="Weights file for a timm model, instead of its pretrained ones; or folder of an adapter's base."),
]
Random = Annotated[
    bool, typer.Option("--random-weights", help="Use a timm model with random weights (to inspect, not to use).")
]
Classes = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Number of classes of a timm model, if not its own; with --checkpoint, those of its weights."),
]
Device = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="cpu, cuda, cuda:1, mps, ...; default: cpu, and for training an accelerator if there is one."),
]
Workers = Annotated[int, typer.Option(help="Number of processes that load images.")]
Images = Annotated[
    Path, typer.Option(help="Folder with one sub-folder of images per class; for a segmenter, `images` and `masks`.")
]
MaybeImages = Annotated[
    Path | None,
    typer.Option(help="Folder with one sub-folder of images per class; for a segmenter, `images` and `masks`."),
]
Unlabelled = Annotated[
    bool, typer.Option(help="Ignore the classes: train on the original's predictions and measure agreement with it.")
]
Drop = Annotated[Optional[float], typer.Option(help="Accepted accuracy drop; 0.01 is one percentage point.")]  # noqa: UP045
Budget = Annotated[Optional[float], typer.Option(help="Mean MACs as a fraction of the original's.")]  # noqa: UP045
BatchSize = Annotated[int, typer.Option(help="Batch size.")]
Repo = Annotated[str, typer.Argument(help="Repository on the Hub: user/name.")]
Revision = Annotated[Optional[str], typer.Option(help="Branch, tag or commit; default: the main branch.")]  # noqa: UP045


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(ee.__version__)
        raise typer.Exit


@app.callback()
def every(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Early exit for any pretrained timm or Hugging Face vision model. Start with: ee-surgery demo"""


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not isinstance(error, ee.SurgeryError):
            raise
        name = plain(f"{type(error).__name__}: ", "bold red")
        Console(stderr=True).print(name.append_text(plain(error)))
        raise typer.Exit(1) from error


@app.command(epilog="Example: ee-surgery inspect resnet18 --random-weights")
def inspect(
    model: Seen,
    everything: Annotated[
        bool, typer.Option("--all", help="Every position, with the reason if samples cannot leave.")
    ] = False,
    num_classes: Classes = None,
    checkpoint: Weights = "",
    random_weights: Random = False,
) -> None:
    """Show where samples can leave a model and the best possible saving; for an adapter, show its exits."""
    with _errors():
        if (folder := _adapter_folder(model)) is not None:
            _show(folder)
            return
        graph = ee.inspect(_model(model, checkpoint, random_weights, num_classes))
        console.print(graph.table(everything), plain(graph.best_case()))


@app.command(epilog="Example: ee-surgery estimate resnet18 --data photos")
def estimate(
    model: Model,
    data: MaybeImages = None,
    exits: Annotated[str, typer.Option(help="Number, `all`, or comma-separated names.")] = "4",
    batch_size: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,32",
    threads: Annotated[Optional[int], typer.Option(help="Number of threads; default: torch's.")] = None,  # noqa: UP045
    max_accuracy_drop: Annotated[
        float, typer.Option(help="At which a linear probe of the images is judged; 0.01 is one percentage point.")
    ] = 0.01,
    seconds: Annotated[float, typer.Option(help="About how long to time each batch size.")] = 15.0,
    device: Device = None,
    unlabelled: Unlabelled = False,
    num_classes: Classes = None,
    checkpoint: Weights = "",
    random_weights: Random = False,
) -> None:
    """Before any training: what leaving where would save on this machine, and whether exits are worth a try."""
    with _errors():
        if threads is not None:
            _set_threads(threads)
        sizes = _sizes(batch_size)
        base = _model(model, checkpoint, random_weights, num_classes).to(_device(device))
        pictures = None if data is None else _pictures(base, data, unlabelled)
        named = _exits(exits)
        options = {"batch_sizes": sizes, "max_accuracy_drop": max_accuracy_drop, "seconds": seconds}
        found = ee.estimate(base, pictures, exits=4 if named is None else named, **options)
        console.print(found.table())
        _say(f"{found.answer}: {found.reason}")


@app.command(epilog="Example: ee-surgery augment test_resnet --random-weights --exits 2 --out runs/adapter")
def augment(
    model: Model,
    out: Annotated[Path, typer.Option(help="Adapter folder to write.")],
    preset: Annotated[str | None, typer.Option(help=f"A published method: {', '.join(names.PRESETS)}.")] = None,
    exits: Annotated[
        str | None, typer.Option(help="Number (default 3), `all`, `auto` (searched), or comma-separated names.")
    ] = None,
    placement: Annotated[
        str | None, typer.Option(help=f"Placement rule (default linear): {', '.join(names.PLACEMENTS)}.")
    ] = None,
    branch: Annotated[
        str | None, typer.Option(help=f"auto, {', '.join(names.BRANCHES)}; comma-separated for `--exits auto`.")
    ] = None,
    train: MaybeImages = None,
    calibrate: MaybeImages = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training images; without it, see --effort.")
    ] = None,
    effort: Annotated[
        EffortName | None,
        typer.Option(help="How much to try, and how long to train; standard if only data is given."),
    ] = None,
    time_budget: Annotated[float | None, typer.Option(help="Minutes for search and training, instead.")] = None,
    max_accuracy_drop: Annotated[
        float, typer.Option(help="Accuracy drop at which the search minimizes the cost; 0.01 is one percentage point.")
    ] = 0.01,
    lr: Annotated[Optional[float], typer.Option(help="Peak learning rate.")] = None,  # noqa: UP045
    views: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Number of distinct augmented passes; later ones repeat them, with features from the disk."),
    ] = None,
    batch_size: Annotated[Optional[int], typer.Option(help="Batch size.")] = None,  # noqa: UP045
    workers: Workers = 0,
    precision: Annotated[
        Optional[TrainPrecision],  # noqa: UP045
        typer.Option(help="Number format of the training; default: auto if an effort decides, else no (float32)."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of branches and training.")] = 0,
    device: Device = None,
    unlabelled: Unlabelled = False,
    num_classes: Classes = None,
    checkpoint: Weights = "",
    random_weights: Random = False,
) -> None:
    """Add branches to a model, train and calibrate them if images are given, and write the adapter folder."""
    with _errors():
        if out.exists() and not out.is_dir():
            raise ee.ConfigError(f"--out {out} is a file: give an existing folder, or the name of a new one.")
        training = out.with_name(f"{out.name}.training")  # a killed run resumes from here when started again
        by_effort = effort is not None or time_budget is not None
        simple = all(given is None for given in (preset, placement, epochs)) and (
            exits == "auto" or (exits is None and branch is None)
        )
        if by_effort and epochs is not None:
            raise ee.ConfigError("--effort and --time-budget decide how long to train: leave out --epochs.")
        given = {"epochs": epochs, "lr": lr, "views": views, "batch_size": batch_size, "mixed_precision": precision}
        config = {"num_workers": workers, "seed": seed}
        config |= {name: value for name, value in given.items() if value is not None}
        if not by_effort and not (simple and train is not None and calibrate is not None):
            teach = "original" if unlabelled else "labels"
            config = {"epochs": 5, "batch_size": 64, "teach": teach, "checkpoint_dir": str(training)} | config
        from ee_surgery.training.config import changed_settings

        changed_settings(config)  # before anything is loaded
        if preset is not None:
            _ = ee.PRESETS[preset]  # an unknown name
        usual = "no" if "epochs" in config else "auto"
        accelerator = None if device is None else _accelerator(device, precision or usual)
        base = _model(model, checkpoint, random_weights, num_classes)
        branched = ee.augment(
            base,
            _exits(exits),
            placement,
            branch.split(",") if branch is not None and "," in branch else branch,
            preset=preset,
            train=None if train is None else _pictures(base, train, unlabelled),
            calibrate=None if calibrate is None else _pictures(base, calibrate, unlabelled),
            config=config,
            effort=effort,
            time_budget=time_budget,
            max_accuracy_drop=max_accuracy_drop,
            seed=seed,
            accelerator=accelerator,
        )
        branched.save_pretrained(out)
        shutil.rmtree(training, ignore_errors=True)
        if importlib.util.find_spec("matplotlib") is not None:
            ee.report(branched, out / "report.html")
        if branched.frontier is not None:
            console.print(branched.frontier)
        untrained = f"\nuntrained: {', '.join(map(visible, branched.untrained))}" if branched.untrained else ""
        _say(
            f"exits at {', '.join(map(visible, branched.exits))}{untrained}\noriginal {branched.receipt()}\nwrote {out}"
        )


@app.command(epilog="Example: ee-surgery train --config pets.yaml --set train.epochs=2")
def train(
    config: Annotated[Path, typer.Option(help="YAML file of the project: model, data, training, operating point.")],
    data: Annotated[Optional[str], typer.Option(help="Overrides data.source: Hub data set, or folder.")] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option(help="Overrides out.")] = None,  # noqa: UP045
    changes: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", metavar="NAME=VALUE", help="Overrides a setting: train.epochs=2; may be repeated."),
    ] = None,
    threads: Annotated[Optional[int], typer.Option(help="Number of threads per process.")] = None,  # noqa: UP045
) -> None:
    """Train, calibrate, evaluate and save as a YAML file says.

    On several GPUs: accelerate launch -m ee_surgery.cli train --config ...
    """
    with _errors():
        from ee_surgery.project.run import run
        from ee_surgery.project.settings import load

        if threads is not None:
            _set_threads(threads)
        given = {"data.source": data, "out": out}
        run(
            load(config, [*(changes or []), *(f"{name}={value}" for name, value in given.items() if value is not None)])
        )


@app.command(epilog="Example: ee-surgery calibrate runs/adapter --data held_out --max-accuracy-drop 0.01")
def calibrate(
    adapter: Adapter,
    data: Images,
    method: Annotated[str, typer.Option(help=f"How to choose thresholds: {', '.join(names.CALIBRATORS)}.")] = "search",
    policy: Annotated[str | None, typer.Option(hidden=True, help="Old name of --method.")] = None,
    max_accuracy_drop: Drop = None,
    budget: Budget = None,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    device: Device = None,
    unlabelled: Unlabelled = False,
    checkpoint: Weights = "",
    random_weights: Random = False,
) -> None:
    """Search thresholds on held-out images, and store the frontier and the operating point in the adapter folder."""
    with _errors():
        from ee_surgery.checks import renamed

        method = renamed("--policy", policy, "--method", method)
        asked = _asked(max_accuracy_drop, budget)
        branched = _load(adapter, checkpoint, random_weights).to(_device(device))
        pictures = _shown(_pictures(branched, data, unlabelled), batch_size, workers)
        frontier = ee.calibrate(branched, pictures, method=method)
        try:
            if asked:
                branched.operate(**asked)
        finally:  # the frontier is kept even if no point meets the request
            branched.save_pretrained(adapter)
            console.print(frontier)


@app.command(epilog="Example: ee-surgery evaluate runs/adapter --data test --budget 0.6")
def evaluate(
    adapter: Adapter,
    data: Images,
    max_accuracy_drop: Drop = None,
    budget: Budget = None,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    device: Device = None,
    unlabelled: Unlabelled = False,
    save: Annotated[
        bool, typer.Option("--save", help="Store results and operating point in the folder and on its card.")
    ] = False,
    checkpoint: Weights = "",
    random_weights: Random = False,
) -> None:
    """Run an adapter with early exit on images, at its stored operating point unless another one is given."""
    with _errors():
        branched = _load(adapter, checkpoint, random_weights, _asked(max_accuracy_drop, budget)).to(_device(device))
        _say(ee.evaluate(branched, _shown(_pictures(branched, data, unlabelled), batch_size, workers)))
        if save:
            branched.save_pretrained(adapter)


@app.command(epilog="Example: ee-surgery bench runs/adapter --data test --engines eager,onnx --batch-size 1,32")
def bench(
    adapter: Adapter,
    data: Images,
    max_accuracy_drop: Drop = None,
    budget: Budget = None,
    engines: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(names.ENGINES)}.")] = "eager",
    batch_size: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1",
    samples: Annotated[int, typer.Option(help="Number of images to time.")] = 64,
    threads: Annotated[int, typer.Option(help="Number of threads.")] = 1,
    results: Annotated[Optional[Path], typer.Option(help="CSV or JSON file to write, by its suffix.")] = None,  # noqa: UP045
    device: Device = None,
    checkpoint: Weights = "",
    random_weights: Random = False,
) -> None:
    """Time an adapter against its original on one or more engines, interleaved, on real images."""
    with _errors():
        from ee_surgery.checks import count

        _set_threads(threads)
        sizes = _sizes(batch_size)
        samples = count("--samples", samples, low=max(sizes))
        branched = _load(adapter, checkpoint, random_weights, _asked(max_accuracy_drop, budget)).to(_device(device))
        inputs = _drawn(_pictures(branched, data, unlabelled=True), samples)
        found = ee.bench(branched, inputs, engines=engines.split(","), batch_sizes=sizes)
        console.print(found)
        if results is not None:
            found.save(results)
            _say(f"wrote {results}")


@app.command(epilog="Example: ee-surgery serve runs/adapter --max-accuracy-drop 0.01 --audit 0.02")
def serve(
    adapter: Adapter,
    host: Annotated[str, typer.Option(help="Address to listen at; this machine alone by default.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0: any that is free.", min=0, max=65535)] = 8000,
    max_accuracy_drop: Drop = None,
    budget: Budget = None,
    audit: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Test in service that at most this share of the answers is not the original's: 0.02."),
    ] = None,
    audit_file: Annotated[Optional[Path], typer.Option(help="JSON file to keep the audit in.")] = None,  # noqa: UP045
    on_alarm: Annotated[AlarmAction, typer.Option(help="What an alarm of --audit does, beside a warning.")] = "warn",
    max_batch: Annotated[int, typer.Option(help="Samples per batch.")] = 32,
    max_pending: Annotated[int, typer.Option(help="Samples that may be in; further requests get 503.")] = 1024,
    threads: Annotated[Optional[int], typer.Option(help="Number of threads; default: torch's.")] = None,  # noqa: UP045
    timeout: Annotated[float, typer.Option(help="Seconds for a body, and for an answer.")] = 30.0,
    grace: Annotated[float, typer.Option(help="Seconds of 503 from /healthz before a drain, for balancers.")] = 0.0,
    knob: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--knob/--no-knob", help="PUT /knob moves the operating point; default: on a loopback address."),
    ] = None,
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Run under torch.compile.")] = False,
    checkpoint: Weights = "",
    random_weights: Random = False,
) -> None:
    """Serve an adapter over HTTP: predictions, the operating point, metrics, and a status page."""
    with _errors():
        for package in ("starlette", "uvicorn", "prometheus_client"):
            if importlib.util.find_spec(package) is None:
                raise ee.ConfigError(f"Serving needs {package}: pip install 'ee-surgery[serve]'.")
        from ee_surgery.serving.command import serve as run

        if threads is not None:
            _set_threads(threads)
        asked = _asked(max_accuracy_drop, budget)
        run(
            lambda: _load(adapter, checkpoint, random_weights, asked),
            host,
            port,
            say=_say,
            epsilon=audit,
            audit_file=audit_file,
            on_alarm=on_alarm,
            max_batch=max_batch,
            max_pending=max_pending,
            timeout_s=timeout,
            grace_s=grace,
            knob=knob,
            compiled=compile,
        )


@app.command(epilog="Example: ee-surgery export runs/adapter model.onnx --max-accuracy-drop 0.01")
def export(
    adapter: Adapter,
    out: Annotated[Path, typer.Argument(help="ONNX file to write, or folder of stages.")],
    stages: Annotated[bool, typer.Option("--stages", help="A folder of stages, for engines without `If`.")] = False,
    quantize: Annotated[Optional[Precision], typer.Option(help="8-bit integers; needs --calibrate.")] = None,  # noqa: UP045
    calibrate: Annotated[
        Optional[Path], typer.Option(help="Held-out images for --quantize, one sub-folder per class.")  # noqa: UP045
    ] = None,
    max_accuracy_drop: Drop = None,
    budget: Budget = None,
    unlabelled: Unlabelled = False,
    checkpoint: Weights = "",
    random_weights: Random = False,
) -> None:
    """Write an adapter and its original as one ONNX file in which samples exit early; checked against the model."""
    with _errors():
        branched = _load(adapter, checkpoint, random_weights, _asked(max_accuracy_drop, budget))
        held_out = None if calibrate is None else _pictures(branched, calibrate, unlabelled)
        layout = "stages" if stages else "file"
        _say(f"wrote {branched.export(out, layout=layout, quantize=quantize, calibrate=held_out)}")


@app.command(epilog="Example: ee-surgery report runs/adapter --data test --bench")
def report(
    adapter: Adapter,
    out: Annotated[Optional[Path], typer.Option(help="HTML file; default: report.html in the adapter folder.")] = None,  # noqa: UP045
    data: MaybeImages = None,
    max_accuracy_drop: Drop = None,
    budget: Budget = None,
    bench: Annotated[
        bool, typer.Option("--bench", help="Time it too, on images of --data, batch sizes 1 and 32.")
    ] = False,
    batch_size: BatchSize = 64,
    unlabelled: Unlabelled = False,
    checkpoint: Weights = "",
    random_weights: Random = False,
) -> None:
    """Write one HTML file that shows it: frontier with a slider, exits, and with images who leaves where."""
    with _errors():
        if bench and data is None:
            raise ee.ConfigError("--bench needs images to time: --data.")
        branched = _load(adapter, checkpoint, random_weights, _asked(max_accuracy_drop, budget))
        pictures = None if data is None else _pictures(branched, data, unlabelled)
        timed = None
        if bench and data is not None:
            timed = ee.bench(branched, _drawn(_pictures(branched, data, unlabelled=True), 64), batch_sizes=(1, 32))
        _say(
            f"wrote {ee.report(branched, out or adapter / 'report.html', pictures, bench=timed, batch_size=batch_size)}"
        )


@app.command(epilog="Example: ee-surgery card runs/adapter --license apache-2.0 --dataset cifar10")
def card(
    adapter: Adapter,
    license: Annotated[str | None, typer.Option(help="License of the branches: apache-2.0, mit, ...")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Hub id of a training data set; may be repeated.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="Language of the texts: en; may be repeated.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Additional tag; may be repeated.")] = None,
    repo_id: Annotated[str | None, typer.Option(help="Its Hub repository: user/name.")] = None,
    eval_dataset: Annotated[str | None, typer.Option(help="Hub id of the evaluation data.")] = None,
    eval_name: Annotated[str | None, typer.Option(help="Display name of the evaluation data.")] = None,
    eval_split: Annotated[str | None, typer.Option(help="Split of the evaluation data: test.")] = None,
    eval_task: Annotated[
        str | None, typer.Option(help="Task of the evaluation data, if it is a benchmark on the Hub.")
    ] = None,
) -> None:
    """Rewrite the model card of an adapter folder, from the folder alone."""
    with _errors():
        about = {"license": license, "datasets": dataset, "language": language, "tags": tag, "repo_id": repo_id,
                 "eval_dataset": eval_dataset, "eval_name": eval_name, "eval_split": eval_split,
                 "eval_task": eval_task}  # fmt: skip
        from ee_surgery.share.card import update_card

        path = update_card(adapter, **{name: value for name, value in about.items() if value})
        _say(f"wrote {path}")


@app.command(epilog="Example: ee-surgery push runs/adapter user/name --private")
def push(
    adapter: Adapter,
    repo_id: Repo,
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Visibility of a new repository; default: that of the account."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; created if missing.")] = None,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload early exits",
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
) -> None:
    """Upload an adapter folder to the Hub in one commit. Log in first with `hf auth login`."""
    with _errors():
        from ee_surgery.share.card import update_card
        from ee_surgery.share.hub import push_folder

        update_card(adapter, repo_id=repo_id)
        hub = {"private": private, "revision": revision, "message": message, "create_pr": create_pr}
        _say(push_folder(adapter, repo_id, **hub))


@app.command(epilog="Example: ee-surgery pull user/name --out runs/adapter")
def pull(
    repo_id: Repo,
    revision: Revision = None,
    out: Annotated[Path | None, typer.Option(help="New folder to copy it to; default: it stays in the cache.")] = None,
) -> None:
    """Download an adapter from the Hub and describe it."""
    with _errors():
        from ee_surgery.files import atomic_write
        from ee_surgery.share.adapter import load_adapter, own_files
        from ee_surgery.share.hub import fetch

        if out is not None and out.exists():
            raise ee.ConfigError(f"{out} already exists: give --out a new folder.")
        folder = fetch(repo_id, revision=revision)
        load_adapter(folder)  # check that it is complete and undamaged before copying
        if out is not None:
            try:
                with atomic_write(out) as partial:
                    for name, path in own_files(folder).items():
                        (partial / name).parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(path, partial / name)
                folder = out
            except OSError as error:
                raise ee.AdapterError(f"Cannot copy {repo_id} to {out}: {error}. Nothing was left there.") from error
        _show(folder)
        _say(f"in {folder}")


@app.command(epilog="Example: ee-surgery demo --out runs/demo")
def demo(out: Annotated[Path, typer.Option(help="Folder for the adapter and the plot.")] = Path("runs/demo")) -> None:
    """Run the whole pipeline on scikit-learn's handwritten digits: minutes, no download."""
    with _errors():
        from ee_surgery.demo import run  # needs scikit-learn

        run(out, console)


def _say(text: object) -> None:
    """Print text that may contain names from an adapter: no markup, no control characters."""
    console.print(plain(text), soft_wrap=True)


def _set_threads(threads: int) -> None:
    import torch

    from ee_surgery.checks import count

    torch.set_num_threads(count("--threads", threads))


def _pictures(model: nn.Module, folder: Path, unlabelled: bool) -> Any:
    from ee_surgery.folders import pictures

    return pictures(model, folder, unlabelled)


def _shown(pictures: Any, batch_size: int, workers: int) -> Any:
    """Batches of pictures, with a bar on a terminal while they are read."""
    from ee_surgery.checks import count
    from ee_surgery.data.batches import loader

    batches = loader(pictures, batch_size, num_workers=count("--workers", workers, low=0))
    return _Shown(batches)


class _Shown:
    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(track(self.batches, "images", console=console, transient=True, disable=not console.is_terminal))


def _device(name: str | None) -> Any:
    """A device that is there; the CPU by default."""
    import torch

    try:
        device = torch.device(name or "cpu")
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise ee.ConfigError(f"--device {name!r} cannot be used here: {first}") from error
    return device


def _accelerator(name: str, precision: str) -> Any:
    """What trains on a device."""
    import torch

    from ee_surgery.training.config import TrainConfig
    from ee_surgery.training.loop import make_accelerator

    device = _device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return make_accelerator(TrainConfig(mixed_precision=precision), cpu=device.type == "cpu")  # pyright: ignore[reportArgumentType]


def _drawn(pictures: Any, samples: int) -> Any:
    """This many of the pictures, at random but always the same."""
    import torch

    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))[:samples]
    return torch.stack([pictures[int(i)] for i in order])


def _sizes(text: str) -> list[int]:
    from ee_surgery.checks import count

    return [count("--batch-size", int(size) if size.isdecimal() else size) for size in text.split(",")]


def _exits(text: str | None) -> int | str | list[str] | None:
    if text is None or text in ("all", "auto"):
        return text
    try:
        return int(text)
    except ValueError:
        return text.split(",")


def _asked(drop: float | None, budget: float | None) -> dict[str, Any]:
    """Arguments for `operate`, checked before anything is loaded."""
    from ee_surgery.checks import accuracy_drop, positive

    asked: dict[str, Any] = {}
    if drop is not None:
        asked["max_accuracy_drop"] = accuracy_drop("--max-accuracy-drop", drop)
    if budget is not None:
        asked["budget"] = positive("--budget", budget)
    if len(asked) > 1:
        raise ee.ConfigError("Give --max-accuracy-drop or --budget, not both.")
    return asked


def _adapter_folder(name: str) -> Path | None:
    """The folder of an adapter, given as a folder or a repository; None if the name is that of a model."""
    from huggingface_hub import hf_hub_download

    from ee_surgery.share.adapter import CONFIG
    from ee_surgery.share.hub import fetch

    path = Path(name)
    if not path.is_dir():
        if "/" not in name:
            return None
        try:
            path = Path(hf_hub_download(name, CONFIG)).parent
        except Exception:  # no such repository, or no connection: `_model` reports it
            return None
    try:
        kind = json.loads((path / CONFIG).read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
    if kind != "ee_surgery":
        return None
    return path if Path(name).is_dir() else fetch(name)


def _show(folder: Path) -> None:
    from ee_surgery.share.adapter import load_adapter
    from ee_surgery.share.tables import adapter_table

    config, _, frontier = load_adapter(folder)
    console.print(adapter_table(config, frontier))


def _model(name: str, checkpoint: str, random_weights: bool, num_classes: int | None = None) -> nn.Module:
    import timm

    from ee_surgery.backbone.base import make_model
    from ee_surgery.checks import count

    known = name.startswith(_TIMM_SOURCES) or timm.is_model(name.partition(".")[0])
    if num_classes is not None and not known:
        raise ee.ConfigError("--num-classes is for timm models: a Hugging Face folder has its own.")
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": count("--num-classes", num_classes)}
    try:
        library = "timm" if known else "transformers"
        return make_model(library, name, checkpoint=checkpoint, pretrained=not random_weights, **options)
    except (OSError, ValueError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise ee.DataError(
            f"Cannot create {name!r}: {first} Give a timm model name (timm.list_models()), or the id or folder of a "
            "Hugging Face image classifier; --random-weights to inspect a timm model without its weights."
        ) from error


def _load(
    adapter: Path, checkpoint: str, random_weights: bool, asked: Mapping[str, Any] | None = None
) -> ee.EarlyExitModel:
    from ee_surgery.share.adapter import load_adapter
    from ee_surgery.share.base import base_with_weights

    base = None  # created by its library from the id in the adapter
    if checkpoint and (Path(checkpoint).is_dir() or checkpoint.startswith(_TIMM_SOURCES)):
        base = _model(checkpoint, "", random_weights=False)
    elif checkpoint or random_weights:
        base = base_with_weights(load_adapter(adapter)[0], checkpoint)
    branched = ee.from_pretrained(adapter, base)
    if asked:
        branched.operate(**asked)
    return branched


def main() -> None:
    """Entry point."""
    try:
        app(prog_name="ee-surgery")
    except Exception:  # a bug here or in a library: its message may quote loaded data
        sys.stderr.write(paragraph(traceback.format_exc(), 100_000) + "\n")
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
