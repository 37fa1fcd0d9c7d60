"""Text of other people where it is shown: no field of an adapter steers a terminal, a table, a card or its snippet."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import ee_surgery as ee
from ee_surgery import cli
from ee_surgery.files import sealed
from ee_surgery.share import card as cards
from ee_surgery.share.adapter import AdapterConfig, load_adapter
from ee_surgery.share.card import CardInfo, write_card
from ee_surgery.share.tables import adapter_table
from ee_surgery.text import cell, code, markdown, paragraph, plain, visible
from tests.hub_server import Hub
from tests.share.test_card import SNIPPET, made

HOSTILE = [
    "\x1b]0;title\x07\x1b[2J\x1b[H",
    "\x1b]52;c;ZXZpbA==\x07",
    "\x9b31m\x9d0;title\x9c",
    "over\r\x08\x08\x7f\x00\x0c\x0bwritten",
    "\u202eright to left\u202c\u2066\u2069\u061c",
    "zero\u200b\u200d\ufeff\u2060\u00ad\u180e\ufe0f\u3164width",
    "two\u2028\u2029\x85\x1dlines",
    "half \udc80 a pair \ud83d",
    "\U000e0041\U000e0001\ue000\u0378",
    "[link=https://evil.example]click[/link] [bold red]x [@click=f('x')]y",
    "[/]",
    "[/not open]",
    "\n\n# Heading\n\ntext",
    "text\n===\n",
    "# Heading",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "\n\n<div>\n\n<!-- -->",
    "![image](https://evil.example/x.png) [link](https://evil.example) [r][r]\n\n[r]: https://evil.example",
    "<https://evil.example> https://evil.example www.evil.example a@evil.example @user #1",
    "www.evil.example",
    "a@evil.example",
    "\n```\n\n# Heading\n\n```",
    "`code` ``two`` ```three",
    "`",
    "a | b \\| c \\\\| d ||",
    "|\n|---|\n| cell |",
    "*a* _b_ **c** ~~d~~ \\*e\\* &lt; &#60;",
    "- item",
    "1. item",
    "> quote",
    "    code",
    "---",
    "\n---\nlicense: evil\nkey: value\n---\n",
    "key: {a: 1} # comment",
    "!!python/object/apply:os.system [x]",
    "'\"\\'\\\"",
    '"); import os; os.system("x")  #',
    "\nimport os\nos.system('x')\n",
    "{{ 7 * 7 }}{% raw %}{# x #}",
    "%s %(x)s {0} {x}",
    "$\\frac{a}{b$ $x",
    "x" * 100_000,
    "\x1b" * 100_000,
    " \t ",
]
ALL = "".join(HOSTILE[:-3])
KEYS = {"base_model", "base_model_relation", "datasets", "language", "library_name", "license", "model-index",
        "pipeline_tag", "tags"}  # fmt: skip
_SGR = re.compile(r"\x1b\[[0-9;]*m")
_GFM = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def bad_characters(text: str) -> str:
    """What no output may hold, line breaks of ours apart."""
    return "".join(sorted({c for c in text if not c.isprintable() and c != "\n"} | set(text) & {"\u3164", "\ufe0f"}))


# --- the door


@given(st.text() | st.sampled_from(HOSTILE), st.integers(20, 300))
def test_visible_text_is_one_bounded_line_without_hidden_characters(text: str, limit: int) -> None:
    shown = visible(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit
    assert visible(shown, limit) == shown
    shown.encode()  # no half of a pair
    if text.isprintable() and text.isascii() and len(text) <= limit:
        assert shown == text


@pytest.mark.parametrize("text", ["côté", "文件夹", "крокодил", "layer2.1", "x" * 200, "😀", "🏳"])
def test_names_in_any_script_stay_as_they_are(text: str) -> None:
    assert visible(text) == text


@given(st.text() | st.sampled_from(HOSTILE))
def test_a_message_keeps_its_lines_and_no_other_control_characters(text: str) -> None:
    shown = paragraph(text)
    assert not bad_characters(shown.replace("\t", ""))
    assert len(shown) <= 4000
    assert plain(text).plain == shown
    assert not plain(text).spans
    if len(text) < 400:
        assert shown.count("\n") == text.count("\n")


@given(st.text() | st.sampled_from(HOSTILE))
def test_markdown_is_text_in_a_paragraph_a_list_a_heading_and_a_table(text: str) -> None:
    shown = visible(text)
    for before in ("", "word ", "- ", "# "):
        block = _GFM.parse(f"{before}{markdown(text)} end" if shown.strip() else f"{before}end")
        assert shown.strip() or not markdown(text)
        (inline,) = [token for token in block if token.type == "inline"]
        assert {token.type for token in inline.children or []} <= {"text", "code_inline"}
        found = "".join(token.content for token in inline.children or [])
        assert found == before.strip("-# ") + " " * (before == "word ") + (f"{shown} end" if shown.strip() else "end")
    table = f"| a | b |\n| --- | --- |\n| {cell(markdown(text))} | {cell(code(text))} |\n"
    tokens = _GFM.parse(table)
    assert Counter(token.type for token in tokens)["td_open"] == 2
    found = [token.content for line in tokens for token in line.children or [] if token.type == "code_inline"]
    assert all(one.replace("\\x7c", "\\|") == shown.replace("\\x7c", "\\|") for one in found)


@pytest.mark.parametrize("text", ["max_prob", "timm 1.15.0", "a, b", "50%", "early-exit", "all: 8 of 8 (SHA-256)"])
def test_simple_words_are_no_code(text: str) -> None:
    assert markdown(text) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_errors_and_warnings_are_shown_clean_and_keep_what_they_were_told(text: str) -> None:
    public = [getattr(ee, name) for name in ee.__all__]
    kinds = [kind for kind in public if isinstance(kind, type) and issubclass(kind, ee.SurgeryError)]
    assert ee.UnknownNameError in kinds
    for kind in [*kinds, ee.SurgeryWarning]:
        error = kind(f"No exit {text}.\nSecond line.")
        assert not bad_characters(str(error).replace("\t", "")), kind
        assert len(str(error)) <= 4000
        assert str(error).endswith("\nSecond line.")
        assert text in error.args[0]


def test_a_warning_reaches_the_terminal_clean() -> None:
    with pytest.warns(ee.SurgeryWarning) as found:
        warnings.warn(f"of {HOSTILE[0]}", ee.SurgeryWarning, stacklevel=1)
    printed = warnings.formatwarning(found[0].message, found[0].category, "file.py", 1)
    assert "\\x1b]0;title" in printed
    assert not bad_characters(printed)


# --- every text of an adapter, one after the other


@cache
def adapter() -> tuple[AdapterConfig, ee.Frontier]:
    """Everything that a folder may hold, as it is read."""
    import tempfile

    branched = made("plain", "everything")
    branched.operate(risk=(0.9, 0.2))
    ee.evaluate(branched, [torch.randn(40, 3, 16, 16)])
    branched.provenance["other_base"] = {"trained_on": "0" * 64, "model_id": "Other"}
    branched.provenance["training"] = {"by": "hand", "versions": {"torch": "2"}, "list": ["a", {"b": "c"}]}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(cards.importlib.util, "find_spec", lambda name: None)
        about = {"license": "mit", "datasets": ["user/data"], "language": "en", "tags": ["tag"], "repo_id": "user/name",
                 "eval_dataset": "user/data", "eval_name": "name", "eval_split": "test", "eval_task": "task",
                 "pipeline_tag": "image-classification"}  # fmt: skip
        config, _, frontier = load_adapter(branched.save_pretrained(folder, **about))
    assert frontier is not None
    config = replace(
        config,
        base=replace(config.base, revision="main", hub_id="user/base", library="transformers"),
        options={"flag": "word"},
        label_names=["a", "b", "c", "d", "e"],
        preprocessing={"crop": "center"},
        output="logits",
    )
    return config, frontier


def variants(value: Any, path: str = "") -> Iterator[tuple[str, Callable[[str], Any]]]:
    """Every text in plain data or dataclasses, keys of tables included: where it is, and how to put another there."""
    if isinstance(value, str):
        yield path, lambda text: text
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            for where, put in variants(getattr(value, field.name), f"{path}.{field.name}"):
                yield where, lambda text, put=put, name=field.name: replace(value, **{name: put(text)})
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield (
                f"{path}[{key}]=",
                lambda text, key=key: {text if name == key else name: item for name, item in value.items()},
            )
            for where, put in variants(item, f"{path}[{key}]"):
                yield where, lambda text, put=put, key=key: {**value, key: put(text)}
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            for where, put in variants(item, f"{path}[{i}]"):
                yield (
                    where,
                    lambda text, put=put, i=i: type(value)([*value[:i], put(text), *value[i + 1 :]]),
                )


# In tables of ours, or as numbers: refused there, in place of being shown.
LOOKED_UP = {"dtype", "score", "fallback", "library", "thresholds"}


def everywhere(value: Any, text: str) -> Any:
    """The text in the place of every one at once, keys and what is looked up apart."""
    if isinstance(value, str):
        return text
    if is_dataclass(value) and not isinstance(value, type):
        taken = LOOKED_UP if text.strip() or not isinstance(value, ee.BranchSpec) else {*LOOKED_UP, "name"}
        names = [field.name for field in fields(value) if field.name not in taken]
        return replace(value, **{name: everywhere(getattr(value, name), text) for name in names})
    if isinstance(value, Mapping):
        return {name: item if name in LOOKED_UP else everywhere(item, text) for name, item in value.items()}
    return type(value)(everywhere(item, text) for item in value) if isinstance(value, (list, tuple)) else value


def shown(config: AdapterConfig, frontier: ee.Frontier, folder: Path) -> dict[str, str]:
    """All that is printed of an adapter and written into its card."""
    screen = Console(file=StringIO(), force_terminal=True, color_system="truecolor", width=4000)
    for table in (adapter_table(config, frontier), frontier):
        screen.print(table)
    point = config.operating_point
    texts = [screen.file.getvalue(), str(frontier), *map(str, frontier.points), str(point)]  # pyright: ignore[reportAttributeAccessIssue]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        path = write_card(folder, config, frontier, str(config.provenance.get("receipt")))
    return {"terminal": "\n".join([*texts, *(str(one.message) for one in told)]), "card": path.read_text()}


@cache
def benign(folder: Path) -> tuple[dict[str, str], Counter[str]]:
    """The same of the adapter as it is, and what its card is made of."""
    found = shown(*adapter(), folder)
    return found, kinds(_GFM.parse(found["card"].removeprefix("---\n").split("\n---\n", 1)[1]))


def check(config: AdapterConfig, frontier: ee.Frontier, folder: Path) -> bool:
    """Nothing in it steers what shows it, or what an error of ours says; whether it was shown."""
    expected, usual = benign(folder)
    try:
        found = shown(config, frontier, folder)
    except ee.SurgeryError as error:
        found = {"terminal": str(error), "card": expected["card"]}
    assert set(_SGR.findall(found["terminal"])) <= set(_SGR.findall(expected["terminal"]))
    assert not bad_characters(_SGR.sub("", found["terminal"]))
    assert not bad_characters(found["card"])
    matter, body = found["card"].removeprefix("---\n").split("\n---\n", 1)
    front = yaml.safe_load(matter)
    assert set(front) <= KEYS
    assert front["library_name"] == "ee_surgery"
    assert not bad_characters("".join(texts(front)))
    tokens = _GFM.parse(body)
    assert kinds(tokens) <= usual
    (snippet,) = SNIPPET.findall(found["card"])
    calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(snippet)) if isinstance(n, ast.Call)}
    assert calls <= {"ee_surgery.from_pretrained", "torch.randn", "branched.predict", "print",
                     "output.logits.argmax", "branched.operate"}  # fmt: skip
    text = " ".join(t.content for token in tokens for t in token.children or [] if t.type == "text")
    assert not re.search(r"https?:|www\.|@|evil", text)
    return found["card"] is not expected["card"]


def kinds(tokens: list[Any]) -> Counter[str]:
    """How often each kind of block and inline element occurs; how text is cut into pieces says nothing."""
    plainly = {"text", "code_inline"}
    return Counter(t.type for token in tokens for t in (token, *(token.children or [])) if t.type not in plainly)


def texts(value: object) -> Iterator[str]:
    """All keys and values of plain data."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)
    elif isinstance(value, str):
        yield value


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where cards are written, without plots and without waiting for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ee_surgery.files._sync", lambda path: None)
        patch.setattr(cards.importlib.util, "find_spec", lambda name: None)
        yield made("plain", "everything").save_pretrained(tmp_path_factory.mktemp("cards") / "exits")


PARTS = ["base", "inputs", "options", "exits", "operating_point", "label_names", "versions", "preprocessing", "output",
         "placement", "opaque", "files", "provenance", "task"]  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_no_text_of_a_config_gets_out_of_its_place(part: str, folder: Path) -> None:
    config, frontier = adapter()
    places = [(where, put) for where, put in variants(config) if where.startswith(f".{part}")]
    assert places or part == "opaque"
    for i, (where, put) in enumerate(places):
        was_shown = check(put(HOSTILE[i % len(HOSTILE)][:50] + ALL), frontier, folder)
        assert was_shown or where.rsplit(".", 1)[-1] in LOOKED_UP, where


def test_the_name_of_a_base_that_has_to_be_passed_stays_a_comment_in_the_snippet(folder: Path) -> None:
    config, frontier = adapter()
    nameless = replace(config, base=replace(config.base, library="torch", hub_id=None))
    for text in (ALL, *HOSTILE[36:38]):
        for architecture in ("", text):
            base = replace(nameless.base, model_id=text, architecture=architecture)
            assert check(replace(nameless, base=base), frontier, folder)
            assert "# `model` is the base: a " in (folder / "README.md").read_text()


def test_every_text_of_a_config_is_looked_at() -> None:
    config, _ = adapter()
    assert [where for where, _ in variants(config) if not where.startswith(tuple(f".{part}" for part in PARTS))] == []
    assert len(list(variants(config))) > 80


def test_no_text_of_a_frontier_gets_out_of_its_place(folder: Path) -> None:
    config, frontier = adapter()
    places = [put for where, put in variants(frontier) if not re.search(r"points\[[1-9]", where)]  # the first of each
    assert len(places) > 5
    for put in places:
        check(config, put(ALL), folder)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text)[:30])
def test_no_string_gets_out_of_any_place(text: str, folder: Path) -> None:
    config, frontier = adapter()
    assert check(everywhere(config, text), everywhere(frontier, text), folder)
    assert "## Measured" in (folder / "README.md").read_text()


# --- the command line


def _run(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code in (0, 1), result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert not bad_characters(_SGR.sub("", result.output))
    return result.output


def test_commands_print_no_text_of_a_folder_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("ee_surgery.files._sync", lambda path: None)
    folder = made("plain", "everything").save_pretrained(tmp_path / "exits", license="mit")
    data = json.loads((folder / "config.json").read_text())
    said = []
    for where, put in variants(data):
        if where.startswith(("[label_names]", "[probe]", "[files]", "[provenance][placement]")):
            continue
        (folder / "config.json").write_text(json.dumps(sealed(put(ALL))))
        said.append(_run("inspect" if len(said) % 4 else "card", str(folder)))
    assert len(said) > 60
    assert len(set(said)) > 5


def test_a_closing_tag_in_a_name_is_printed(tmp_path: Path) -> None:
    folder = made("plain", "bare").save_pretrained(tmp_path / "exits")
    data = json.loads((folder / "config.json").read_text())
    data["exits"][0]["name"] = "[/] [link=https://evil.example]x[/link]"
    data["base"]["hub_id"] = None
    data["base"]["model_id"] = "[bold]Net[/bold]"
    (folder / "config.json").write_text(json.dumps(sealed(data)))
    out = _run("inspect", str(folder))
    assert "[bold]Net[/bold]" in out
    assert "[/] [link=https://evil.example]x[/link]" in out


def test_a_pulled_adapter_and_an_error_of_the_hub_are_printed_clean(hub: Hub, tmp_path: Path) -> None:
    folder = made("plain", "frontier").save_pretrained(tmp_path / "exits")
    data = json.loads((folder / "config.json").read_text())
    data["base"]["model_id"], data["base"]["hub_id"] = "Net", None
    data["\x1b]0;title\x07"] = 1  # a key that an error names
    (folder / "config.json").write_text(json.dumps(sealed(data)))
    assert "AdapterError" in _run("push", str(folder), "user/name")
    hub.put("user/name", {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    assert "\\x1b]0;title" in _run("pull", "user/name")
    assert "HubError" in _run("pull", f"user/{HOSTILE[0]}")


def test_a_fault_that_is_not_ours_is_printed_clean(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**options: object) -> None:
        raise RuntimeError(f"unexpected {HOSTILE[0]}")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as left:
        cli.main()
    printed = capsys.readouterr().err
    assert left.value.code == 1
    assert "RuntimeError: unexpected \\x1b]0;title" in printed
    assert not bad_characters(printed)


# --- module names of a base


def test_names_of_a_models_modules_are_text_on_screen_and_in_plots(tmp_path: Path) -> None:
    names = ["[/]", "\x1b]0;title\x07", "$\\frac{a}{b$", "[bold]x"]
    net = nn.Sequential()
    for i, name in enumerate(names):
        net.add_module(name, nn.Sequential(nn.Conv2d(3 if i == 0 else 8, 8, 3, stride=2, padding=1), nn.ReLU()))
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flat", nn.Flatten())
    net.add_module("head", nn.Linear(8, 5))
    graph = ee.inspect(net.eval(), torch.randn(2, 3, 32, 32))
    branched = ee.attach(graph, ee.place(graph, names))
    frontier = ee.calibrate(branched, [torch.randn(40, 3, 32, 32)])
    branched.operate(frontier[0])
    screen = Console(file=StringIO(), force_terminal=False, width=300)
    for thing in (graph, graph.table(everything=True), frontier):
        screen.print(thing)
    found = ee.evaluate(branched, [torch.randn(40, 3, 32, 32)])
    out = "\n".join([screen.file.getvalue(), str(graph), str(frontier), str(found), graph.best_case()])  # pyright: ignore[reportAttributeAccessIssue]
    assert not bad_characters(out)
    assert all(visible(name) in out for name in names)
    frontier.plot(tmp_path / "plot.png")
    labels = frontier.plot().axes[0].texts
    assert [label.get_text() for label in labels] == list(map(visible, branched.exits))
    assert not any(label.get_parse_math() or label.get_usetex() for label in labels)


# --- what a card is told


@pytest.mark.parametrize("text", [text for text in HOSTILE if visible(text) != text or not text.strip()])
def test_a_card_is_told_visible_text_only(text: str) -> None:
    with pytest.raises(ee.ConfigError, match="eval_name of a model card must be text"):
        CardInfo.of({"eval_name": text})


def test_what_an_earlier_card_was_told_wrongly_does_not_keep_one_from_being_written() -> None:
    config, _ = adapter()
    told = {"license": 3, "tags": ["good"], "repo_id": "a/b/c", "eval_task": "task", "unknown": "x", "language": [ALL]}
    with pytest.warns(ee.SurgeryWarning, match="earlier card is left out") as found:
        info = CardInfo.stored(replace(config, provenance={"card": told}), {})
    assert info == CardInfo(tags=("good",))
    assert len(found) == 4
