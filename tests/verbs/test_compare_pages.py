"""The report's pages and plots: what they hold, and how they look in a real browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from support.browser import chromium, complaints, requests

from quantkit.progress import number
from quantkit.verbs.compare.pages import visible, write_pages
from quantkit.verbs.compare.plots import Drawn, plot_files, short_names
from quantkit.verbs.labels import _Box, _cost

SIZES = {
    "Q4_0": 91_700_000,
    "Q5_0": 105_000_000,
    "Q4_K_M": 105_500_000,
    "GPTQ-4bit-64g": 114_600_000,
    "Q8_0": 144_800_000,
}
KL = {"Q4_0": 0.4, "Q5_0": 0.1, "Q4_K_M": 0.069, "GPTQ-4bit-64g": 0.227, "Q8_0": 0.0016}
ON_FRONT = ("Q4_0", "Q5_0", "Q4_K_M", "Q8_0")
HOSTILE = '<script>alert("x")</script>'
SVG = "{http://www.w3.org/2000/svg}"


def label(kind: str) -> str:
    return f"SmolLM2-135M-Instruct-{kind}"


def model(name: str, size: int, kl: float | None, front: bool) -> dict[str, Any]:
    top = [{"token": " the", "probability": 0.5}, {"token": "a|b`", "probability": 0.25}]
    at = {"window": 3, "position": 17, "kl": 1.25, "context": HOSTILE, "target": "\n", "reference_top": top, "top": top}
    divergence = None
    if kl is not None:
        divergence = {key: kl * factor for factor, key in enumerate(("mean", "median", "p90", "p99", "p999", "max"), 1)}
    return {
        **{"model": name, "kind": "gguf", "scheme": "gguf: mostly Q4_0", "reference": kl is None, "bytes": size},
        **{"bits_per_weight": size / 2e7, "files": {f"{name}.gguf": "0" * 64}, "pareto": front, "layers": None},
        "texts": {
            "held_out.txt": {
                **{"perplexity": 40 + 10 * (kl or 0), "stderr": 1.5, "kl_divergence": divergence},
                **{"delta_ln_ppl": kl, "delta_ln_ppl_stderr": None if kl is None else 0.0004},
                **dict.fromkeys(("kl_divergence_stderr", "top1_agreement_stderr"), None if kl is None else 0.0123),
                **{"top1_agreement": None if kl is None else 1 - kl, "worst": [] if kl is None else [at]},
            }
        },
    }


def said(output: str, mark: list[int] | None) -> dict[str, Any]:
    return {
        **{"output": output, "finish_reason": "eos", "output_tokens": 9},
        **{"mark": mark, "parts_after": None if mark is None else 7},
    }


REPORT: dict[str, Any] = {
    "quantkit": "0.1.0",
    "reference": label("fp16"),
    "texts": [{"name": "held_out.txt", "tokens": 12345, "seq_len": 512, "stride": None, "tokens_sha256": "0" * 64}],
    "models": [
        model(label("fp16"), 269_000_000, None, True),
        *(model(label(kind), size, KL[kind], kind in ON_FRONT) for kind, size in SIZES.items()),
    ],
    "choice": {"model": label("Q4_K_M"), "why": "it is <small> & near"},
    "unmet": None,
    "answers": {
        **{"name": "asked.jsonl", "template": "chat", "max_new_tokens": 64, "tokens_sha256": "0" * 64},
        "agreement": {label(kind): {"prompts": 2, "equal": 0.5, "parts_after": 7} for kind in SIZES},
        "skills": {"a|b": {label(kind): {"prompts": 2, "equal": 0.5, "parts_after": None} for kind in SIZES}},
        "prompts": [
            {
                **{"id": HOSTILE, "skill": "a|b", "prompt": f"say\n```\n{HOSTILE}", "prompt_tokens": 9},
                "answers": {
                    label("fp16"): said(f"{HOSTILE} ```` yes", None),
                    label("Q4_0"): said(f"{HOSTILE} no\x1b[2J", [len(HOSTILE), len(HOSTILE) + 3]),
                    label("Q8_0"): said(HOSTILE, [len(HOSTILE)] * 2),
                },
            }
        ],
    },
}


def drawn(kind: str) -> Drawn:
    kl = KL.get(kind, 0.0)
    layers = [kl * (1 + i / 10) for i in range(30)] if kl else None
    values = kl * np.random.default_rng(0).lognormal(-0.5, 1.2, 2000)
    return Drawn(label(kind), SIZES.get(kind, 269_000_000), kl, kind in ON_FRONT, layers, values)


@pytest.fixture(scope="module")
def figures() -> dict[str, bytes]:
    pytest.importorskip("matplotlib")
    return plot_files(drawn("fp16"), [drawn(kind) for kind in SIZES])


@pytest.fixture(scope="module")
def page(figures: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_pages(folder, REPORT, figures)
    return folder / "report.html"


# -- plots -----------------------------------------------------------------------------------------------------------


def texts_in(svg: bytes) -> list[str]:
    return [found.text or "" for found in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_plots_name_their_axes_with_units_and_every_variant(figures: dict[str, bytes]) -> None:
    expected = {
        "accuracy-size": {"size of the weight files (MB)", "mean KL divergence (nats per token)", "Pareto front"},
        "layers": {"decoder block", "relative squared error of its output"},
        "kl": {"KL divergence at a token (nats)", "share of tokens that diverge more"},
    }
    for name, words in expected.items():
        found = texts_in(figures[f"{name}.svg"])
        assert words <= set(found)
        assert set(SIZES) <= set(found), name
        assert not [text for text in found if "$" in text], name
    assert {"size of the reference", "not on the front"} <= set(texts_in(figures["accuracy-size.svg"]))


def test_plots_hold_no_date_and_no_program(figures: dict[str, bytes]) -> None:
    for name, content in figures.items():
        assert b"atplotlib" not in content.replace(b'"matplotlib.axis', b""), name
        assert not re.search(rb"<dc:date>|tEXt|tIME", content), name
    assert figures == plot_files(drawn("fp16"), [drawn(kind) for kind in SIZES])


@pytest.mark.parametrize("count", [1, 14])
def test_plots_of_few_and_of_many_long_names(count: int) -> None:
    pytest.importorskip("matplotlib")
    variants = [
        Drawn(
            f"{chr(97 + i)}-{'very-' * 12}long-name-{i}", 10**9 + i * 10**8, 0.5 / (i + 1), True, [0.1], np.full(5, 0.1)
        )
        for i in range(count)
    ]
    files = plot_files(drawn("fp16"), variants)
    found = texts_in(files["kl.svg"])
    assert all(any(text.endswith(f"long-name-{i}") and "…" in text for text in found) for i in range(count))
    assert "size of the weight files (GB)" in texts_in(files["accuracy-size.svg"])


@pytest.mark.parametrize("crowded", [False, True])
def test_names_that_have_no_room_beside_their_points_go_below(crowded: bool) -> None:
    """Names beside points stand inside the axes, those of the legend below them: further down in the SVG."""
    pytest.importorskip("matplotlib")
    steps = [(1.0005, 1.001)] * 16 if crowded else [(1.2, 0.3)] * 6
    variants = [
        Drawn(
            f"{chr(97 + i)}-{'long-' * (4 if crowded else 1)}name", int(1e8 * x**i), 0.1 * y**i, True, None, np.ones(3)
        )
        for i, (x, y) in enumerate(steps)
    ]
    svg = ElementTree.fromstring(plot_files(drawn("fp16"), variants)["accuracy-size.svg"])
    heights = {
        text.text: float(text.get("y") or re.findall(r"translate\(\S+ (\S+)\)", text.get("transform", ""))[0])
        for text in svg.iter(f"{SVG}text")
    }
    below = [heights[variant.label] > heights["size of the weight files (MB)"] for variant in variants]
    assert below == [crowded] * len(steps)


def test_plots_of_variants_that_lose_nothing() -> None:
    pytest.importorskip("matplotlib")
    same = Drawn("F16", 269_000_000, 0.0, True, [0.0, 0.0], np.zeros(9))
    files = plot_files(drawn("fp16"), [same])
    assert "F16 (no divergence)" in texts_in(files["accuracy-size.svg"])
    assert "no token diverges" in texts_in(files["kl.svg"])
    assert "no error in any block, or no blocks to compare" in texts_in(files["layers.svg"])
    mixed = plot_files(drawn("fp16"), [same, drawn("Q8_0")])
    assert "F16 (no error)" in texts_in(mixed["layers.svg"])


def test_short_names() -> None:
    assert short_names(["a-b-Q4_0", "a-b-Q5_0"]) == ["Q4_0", "Q5_0"]
    assert short_names(["a-b", "a-b-c"]) == ["b", "b-c"]
    assert short_names(["W-1.0", "W-1.0-Q4", "W-1.0.q5"]) == ["1.0", "1.0-Q4", "1.0.q5"]  # "0" would be no name
    assert short_names(["W-1.q4", "W-1.q5"]) == ["q4", "q5"]
    assert short_names(["model-Q4_0"]) == ["model-Q4_0"]
    assert short_names(["x" * 50, "y" * 50]) == [f"{'x' * 16}…{'x' * 16}", f"{'y' * 16}…{'y' * 16}"]
    alike = ["a" * 20 + letter + "b" * 20 for letter in "xy"]
    assert short_names(alike) == alike  # cut, they would be one


def test_a_label_avoids_text_before_lines_and_the_edge() -> None:
    frame, at = _Box(0, 0, 100, 100), _Box(40, 40, 60, 50)
    free = _cost(at, 9, [], [], frame)
    assert free == 9
    assert _cost(at, 9, [], [_Box(45, 0, 46, 100)], frame) > _cost(at, 30, [], [], frame)
    assert _cost(at, 9, [_Box(55, 45, 80, 60)], [], frame) > _cost(at, 60, [], [_Box(45, 0, 46, 100)], frame)
    assert _cost(_Box(90, 40, 110, 50), 9, [], [], frame) > 1000


# -- pages -----------------------------------------------------------------------------------------------------------


class Outline(HTMLParser):
    """Ids, and addresses that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.scripts = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.links.append(str(value))


def test_html_is_one_file_that_asks_for_nothing(page: Path) -> None:
    text = page.read_text()
    outline = Outline(text)
    assert all(link.startswith(("#", "data:,")) for link in outline.links)
    assert len(outline.ids) == len(set(outline.ids))
    assert all(link[1:] in outline.ids for link in outline.links if link.startswith("#"))
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(outline.ids)
    assert not re.search(r"@import|url\((?!#)", text)
    assert "width=device-width" in text
    assert text.count("<svg") == 3


def test_text_of_models_and_files_is_text(page: Path) -> None:
    html = page.read_text()
    assert Outline(html).scripts == 1
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;" in html
    assert "it is &lt;small&gt; &amp; near" in html
    markdown = page.with_name("report.md").read_text()
    assert r"\<script\>alert" in markdown
    assert "| `⏎` |" in markdown


def test_answers_are_text_with_the_first_other_token_marked(page: Path) -> None:
    html, markdown = page.read_text(), page.with_name("report.md").read_text()
    assert "&lt;/script&gt;<mark> no</mark>\\x1b[2J</td>" in html
    assert "&lt;/script&gt;<mark>(the end)</mark></td>" in html
    assert f"`````text\n{HOSTILE} ```` yes\n`````" in markdown
    assert f"````text\nsay\n```\n{HOSTILE}\n````" in markdown
    assert f"{HOSTILE}⟦ no⟧\\x1b[2J" in markdown
    assert "### Prompt \\<script\\>" in markdown


def test_markdown_tables_have_as_many_cells_as_heads(page: Path) -> None:
    rows = [line for line in page.with_name("report.md").read_text().splitlines() if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", row)) - 1 for row in rows]
    tables = {12: 2 + len(SIZES) + 1, 7: 3 * len(SIZES), 4: 2 + len(SIZES) + 1}
    tables |= {3: 2 + len(SIZES), 2 + 2 * len(SIZES): 3 + tables[12]}
    assert {width: widths.count(width) for width in set(widths)} == tables
    assert f"| {label('Q8_0')} ★ | 144.8 MB | 0.0016 ± 0.0123 |" in "\n".join(rows)


def test_pages_without_plots_and_with_an_unmet_wish(tmp_path: Path) -> None:
    write_pages(tmp_path, {**REPORT, "choice": None, "unmet": "no variant is that small"}, {})
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text()
        assert "No variant is that small." in text
        assert "Plots" not in text
        assert "<svg" not in text


def test_numbers_and_tokens_are_shown_so_that_they_can_be_told() -> None:
    assert [number(value) for value in (0.0, 0.0123456, -0.5)] == ["0.0000", "0.0123", "-0.5000"]
    assert [number(value) for value in (0.00012, -0.0000761, 1e-9)] == ["0.00012", "-0.000076", "1.0e-09"]
    assert [visible(text) for text in (" a", "\n\t", "", "\x00")] == ["␣a", "⏎⇥", "(nothing)", "�"]


# -- in a browser ----------------------------------------------------------------------------------------------------


def column(driver: Any, number: int) -> list[str]:
    script = (
        "return [...document.querySelectorAll('table.models tbody tr')].map(row => row.cells[arguments[0]].innerText)"
    )
    return [str(text).split(" ★")[0] for text in driver.execute_script(script, number)]


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_page_opens_quietly_and_fits(width: int, page: Path, tmp_path: Path) -> None:
    with chromium(tmp_path / "profile", width) as driver:
        driver.get(page.as_uri())
        assert driver.title == f"{label('fp16')} and its variants"
        assert [url for url in requests(driver) if not url.startswith("data:")] == [page.as_uri()]
        assert complaints(driver) == []
        script = (
            "for (const d of document.querySelectorAll('details')) d.open = true; const e = document.documentElement;"
        )
        assert driver.execute_script(f"{script} return [e.scrollWidth - e.clientWidth, window.innerWidth]") == [
            0,
            width,
        ]
        # The plots are as wide as the page allows, and drawn.
        boxes = driver.execute_script(
            "return [...document.querySelectorAll('figure svg')].map(s => [s.getBoundingClientRect().width, "
            "s.getBoundingClientRect().height])"
        )
        assert len(boxes) == 3
        assert all(300 < wide <= width and tall > 200 for wide, tall in boxes)
        # A table that is wider scrolls inside its own box.
        box = driver.execute_script(
            "const b = document.querySelector('.scroll'); return [b.scrollWidth, b.clientWidth]"
        )
        assert box[0] > box[1] or width > 390


@pytest.mark.browser
def test_heads_sort_by_value(page: Path, tmp_path: Path) -> None:
    with chromium(tmp_path / "profile", 1280) as driver:
        driver.get(page.as_uri())
        heads = driver.find_elements("css selector", "table.models thead th")
        written = column(driver, 0)
        assert [head.get_attribute("aria-sort") for head in heads] == [None] * 12
        heads[2].find_element("css selector", "button").click()
        by_kl = [label(kind) for kind in sorted(KL, key=lambda kind: KL[kind])]
        assert column(driver, 0) == [*by_kl, label("fp16")]  # what has no value comes last
        assert heads[2].get_attribute("aria-sort") == "ascending"
        heads[2].find_element("css selector", "button").click()
        assert column(driver, 0) == [*by_kl[::-1], label("fp16")]
        assert heads[2].get_attribute("aria-sort") == "descending"
        heads[1].find_element("css selector", "button").click()
        assert column(driver, 0) == [label(kind) for kind in SIZES] + [label("fp16")]
        assert [head.get_attribute("aria-sort") for head in heads[:3]] == [None, "ascending", None]
        heads[0].find_element("css selector", "button").click()
        assert column(driver, 0) == driver.execute_script(
            "return arguments[0].sort((a, b) => a.localeCompare(b))", written
        )


@pytest.mark.browser
def test_dark_scheme_changes_page_and_plots(page: Path, tmp_path: Path) -> None:
    script = """
        const of = (selector, what) => getComputedStyle(document.querySelector(selector))[what];
        const title = [...document.querySelectorAll('svg text')].find(t => t.textContent == 'Accuracy against size');
        return [of('body', 'backgroundColor'), of('body', 'color'), getComputedStyle(title).fill,
                of('#accuracy-size-patch_1 path', 'fill')];
    """
    found = {}
    for dark in (False, True):
        with chromium(tmp_path / f"profile-{dark}", 390, dark) as driver:
            driver.get(page.as_uri())
            found[dark] = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in driver.execute_script(script)]
    paper, ink, title, ground = found[False]
    assert min(paper, ground) > 700
    assert max(ink, title) < 150
    paper, ink, title, ground = found[True]
    assert max(paper, ground) < 100
    assert min(ink, title) > 600
