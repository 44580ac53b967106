"""The page as a file: nothing in it leads anywhere, everything in it is escaped, and its policy is that of its scripts."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.report.made import FP32, INT8, NASTY, made_table, row, study, write_bench, write_study
from vitedge.errors import UnavailableError
from vitedge.report.formats import html
from vitedge.report.records import Table

pytest.importorskip("plotly", reason="the page needs the [report] extra")
VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """Tags with their attributes, the text of scripts and styles, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": [], "title": []}
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)
        if tag in self.inside:
            self.inside[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.inside:
            self.inside[self.open[-1]][-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [row("untouched", [FP32]), row(NASTY, [INT8], failure=NASTY), row("failed", [], failure=NASTY)]
    path = write_study(tmp_path_factory.mktemp("study"), study(rows=rows, study=NASTY))
    return html.render(made_table(path), 100)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_it_is_one_file_of_less_than_6_mb_in_utf8(text: str, page: Page):
    assert len(text.encode()) < 6e6
    assert text.startswith("<!doctype html>") and page.all("meta")[0] == {"charset": "utf-8"}
    assert page.open == []
    (title,) = page.inside["title"]
    assert title == NASTY


def test_nothing_in_it_leads_to_a_network(page: Page):
    for tag, attrs in page.tags:
        for name in ("src", "href", "action", "data", "poster", "srcset", "formaction", "background"):
            assert re.match(r"^(#[\w-]*|data:.*|)$", attrs.get(name, "")), (tag, attrs[name])
        assert not [name for name in attrs if name.startswith("on")], attrs
    assert all("url(" not in style and "@import" not in style for style in page.inside["style"])
    assert {tag for tag, _ in page.tags} & {"iframe", "object", "embed", "base", "form"} <= {"form"}


def test_the_policy_allows_its_own_scripts_and_no_connection(page: Page):
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    rules = {words.split()[0]: words.split()[1:] for words in policy.split(";")}
    assert rules["default-src"] == ["'none'"]
    assert rules["img-src"] == ["data:", "blob:"]
    assert "connect-src" not in rules
    scripts = [
        body for body, attrs in zip(page.inside["script"], page.all("script"), strict=True) if attrs.get("type") != "application/json"
    ]
    assert len(scripts) == 3
    # The library is run as what it is unpacked to, and that is what its hash is of.
    scripts[0] = gzip.decompress(base64.b64decode(scripts[0])).decode()
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" for body in scripts]
    assert rules["script-src"] == hashes
    assert not any("\r" in body for body in scripts)


def test_labels_are_text_wherever_they_stand(text: str, page: Page):
    assert "<img src=x" not in text
    assert page.all("img") == []
    assert text.count("</script>") == len(page.all("script")) == 4
    (figures,) = [body for body, attrs in zip(page.inside["script"], page.all("script"), strict=True) if attrs.get("id") == "figures"]
    names = [trace["name"] for figure in json.loads(figures) for trace in figure["traces"]]
    assert "untouched" in names and not any("<" in name.replace("<br>", "") for name in names)  # the one tag is ours


def test_tables_have_heads_that_sort_and_rows_that_filter(page: Page):
    heads = page.all("th")
    columns = [attrs for attrs in heads if attrs.get("scope") == "col"]
    assert columns and all(attrs["aria-sort"] == "none" and attrs["title"] for attrs in columns)
    rows = [attrs for attrs in page.all("tr") if "data-device" in attrs]
    assert [(attrs["data-device"], attrs["data-runtime"]) for attrs in rows] == [
        ("board", "onnxruntime"),
        ("board", "onnxruntime"),
        ("board", ""),
    ]
    regions = [attrs for attrs in page.all("div") if attrs.get("class") == "scroll"]
    assert regions and all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in regions)


def test_ids_are_there_once_and_links_lead_to_them(page: Page):
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    assert {attrs["href"].removeprefix("#") for attrs in page.all("a")} <= set(ids)


def test_without_any_figure_it_is_a_page_all_the_same(tmp_path: Path):
    bare = replace(FP32, top1=None, top1_interval=None, answers=None, samples_ms=[])
    found = Page(html.render(made_table(write_bench(tmp_path / "a.json", [bare])), 100))
    (figures,) = [body for body, attrs in zip(found.inside["script"], found.all("script"), strict=True) if attrs.get("id") == "figures"]
    assert json.loads(figures) == []


def test_a_build_without_pictures_says_how_they_are_drawn(tmp_path: Path):
    (tmp_path / "builds" / "untouched").mkdir(parents=True)
    text = html.render(made_table(write_study(tmp_path)), 100)
    assert f"vitedge inspect {tmp_path / 'builds' / 'untouched'} draws them" in text


def test_without_plotly_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    table: Table = made_table(write_study(tmp_path))
    with pytest.raises(UnavailableError, match=r"pip install 'vitedge\[report\]'"):
        html.render(table, 100)
