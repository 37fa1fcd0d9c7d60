"""Run as a program: save one adapter over another in children that die at each rename, and in several at once.

Prints, as JSON, what each folder held afterwards: the name of the save, or what was refused.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import ee_surgery as ee
from ee_surgery.share.adapter import load_adapter, own_files
from tests.zoo import BY_NAME, branched


class _Picture:
    def savefig(self, path: Path, **options: object) -> None:
        """In place of a plot, which takes long."""
        path.write_bytes(b"picture")


def _variants() -> dict[str, Callable[[Path], Path]]:
    """Two saves that differ in tensors, thresholds, frontier and card."""
    model, saves = branched("cifar-resnet20"), {}
    ee.Frontier.plot = lambda self, path=None: _Picture()  # pyright: ignore[reportAttributeAccessIssue]
    frontier = ee.calibrate(model, [BY_NAME["cifar-resnet20"].sample(8)])
    states = {
        "old": {name: tensor.clone() for name, tensor in model.branches.state_dict().items()},
        "new": {name: tensor + 1 for name, tensor in model.branches.state_dict().items()},
    }
    for name, state in states.items():

        def save(folder: Path, name: str = name, state: dict[str, torch.Tensor] = state) -> Path:
            model.branches.load_state_dict(state)
            model.frontier = frontier if name == "old" else None
            model.operate(thresholds=0.25 if name == "old" else 0.75)
            return model.save_pretrained(folder, license="mit" if name == "old" else "apache-2.0")

        saves[name] = save
    return saves


def held(folder: Path, tensors: dict[str, float]) -> str:
    """Which save a folder loads as; every file that it would push belongs to it."""
    config, stored, frontier = load_adapter(folder)
    assert config.operating_point is not None
    name = {0.25: "old", 0.75: "new"}[config.operating_point.thresholds[0]]
    first = min(stored.shapes)
    card = own_files(folder)["README.md"].read_text()
    whole = stored.read(first).sum().item() == tensors[name] and (frontier is not None) == (name == "old")
    return name if whole and ("license: mit" in card) == (name == "old") else "mixed"


def _in_child(work: Callable[[], object]) -> int:
    """Run something in a child process; returns its status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _dying(work: Callable[[], object], moment: int, after: bool) -> None:
    """Die before or after a rename."""
    rename, count = os.replace, 0

    def replace(*places: object) -> None:
        nonlocal count
        count += 1
        if count == moment and not after:
            os._exit(7)
        rename(*places)  # pyright: ignore[reportArgumentType]
        if count == moment:
            os._exit(7)

    os.replace = replace  # pyright: ignore[reportAttributeAccessIssue]
    work()


def kills(folder: Path) -> list[list[str]]:
    """For each moment: what the folder held when the writer had died, and after the next save of the old one."""
    saves, tensors = _variants(), {}
    for name, save in saves.items():
        stored = load_adapter(save(folder / name))[1]
        tensors[name] = stored.read(min(stored.shapes)).sum().item()
    found = []
    for after in (False, True):
        for moment in range(1, 100):
            place = folder / f"{moment}{after}"
            saves["old"](place)
            if _in_child(lambda: _dying(lambda: saves["new"](place), moment, after)) != 7:  # noqa: B023
                break
            before = held(place, tensors)
            saves["old"](place)
            again = held(place, tensors)
            left = sorted(
                path.name for path in place.iterdir() if path.name.startswith(".") and path.name[1:7] == "config"
            )
            found.append([before, again, *left])
    return found


def races(folder: Path) -> list[str]:
    """What a reader saw while two writers saved into one folder."""
    saves, tensors = _variants(), {}
    for name, save in saves.items():
        stored = load_adapter(save(folder / name))[1]
        tensors[name] = stored.read(min(stored.shapes)).sum().item()
    place = saves["old"](folder / "both")
    children = []
    for save in saves.values():
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for _ in range(6):
                    save(place)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    seen, running = [], set(children)
    while running:
        config, stored, frontier = load_adapter(place)
        assert config.operating_point is not None
        name = {0.25: "old", 0.75: "new"}[config.operating_point.thresholds[0]]
        whole = stored.read(min(stored.shapes)).sum().item() == tensors[name]
        seen.append(name if whole and (frontier is not None) == (name == "old") else "mixed")
        for child in [*running]:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                assert status == 0
                running.remove(child)
    return [*seen, held(place, tensors), *sorted(path.name for path in place.iterdir() if "config.json." in path.name)]


if __name__ == "__main__":
    torch.set_num_threads(1)  # children of a fork have no other threads
    print(json.dumps({"kills": kills, "races": races}[sys.argv[1]](Path(sys.argv[2]))))
