"""The words of the field: phrases that no page, docstring, comment or message uses, and what to write instead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import ROOT

_OF_WHAT = "exit|epoch|branch|class|sample|fold|stage|risk|call|batch|step|image|picture|backbone|channel|line"
_COUNTED = (
    r"(?:one|an?|\d+|single) (?!(?:of|with|in|to|for|at|is|as|on)\b)[\w-]+"
    r"|ms|us|seconds|steps|samples|images|numbers|bytes|MACs|batches|values"
)
PHRASES = {
    r"luck(y|ily)?": "optimism, by chance",
    r"by (the|those of the|that of the) original's": "as a fraction of the original's, relative to the original's",
    r"(nobody|somebody|whoever|everybody)": "no samples, some samples, samples that",
    r"MACs are no time": "MACs are not latency",
    r"who never (left|leaves)": "samples that never exit early",
    r"MACs of a sample": "MACs per sample",
    rf"({_COUNTED}) an? ({_OF_WHAT})": "one threshold per exit",
    r"as long as it knows such": "cached with the program",
    r"made up its mind": "resolved options",
    r"how sure \w+ losses": "confidence bounds for a mean loss",
    r"what all of them make of": "reduce over the whole batch",
    r"has to teach": "features and targets",
    r"(comes again|crop for crop)": "repeats exactly",
    r"has now a base of its own": "new base",
    r"nothing finite to say": "non-finite logits",
    r"whatever one half tells the other": "leakage between samples",
    r"(came|come) through to": "reached",
    r"to blame": "the cause, the module responsible",
    r"own word": "settings of the model",
    r"worth having": "that pay off, Pareto-optimal",
    r"the ground that": "what thresholds are chosen on",
    r"whatever the user has": "any form of data",
}
PATTERN = re.compile(r"\b(?:" + "|".join(f"(?:{phrase})" for phrase in PHRASES) + r")\b", re.IGNORECASE)
FILES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "mkdocs.yml",
    *sorted(
        path
        for folder in ("docs", "ee_surgery", "benchmarks", "recipes")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".md", ".py", ".yaml")
    ),
]


def _found(text: str) -> list[str]:
    """The phrases in a text, also across line ends."""
    return [re.sub(r"\s+", " ", match[0]) for match in PATTERN.finditer(re.sub(r"\s*\n[\s#]*", " ", text))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_home_made_phrases(path: Path) -> None:
    assert _found(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "one threshold an exit",
        "mean MACs, by the\n    original's",
        "# nobody\n",
        "Luck",
        "2 us a call",
        "What one batch has to teach.",
    ],
)
def test_phrases_are_seen(text: str) -> None:
    assert _found(text)


@pytest.mark.parametrize(
    "text", ["one threshold per exit", "a call of a model", "as a fraction of the original's MACs"]
)
def test_plain_words_pass(text: str) -> None:
    assert not _found(text)
