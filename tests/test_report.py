"""The page: whole, escaped, self-contained, the same each time, with the numbers of the table; and the commands."""

import base64
import csv
import io
import itertools
import json
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import made_studies
import pytest
from made_rows import NOTHING
from sample_sweep import NAME
from sample_sweep import stored as sampled

from orchestrator import cli
from orchestrator.cli import drawing
from orchestrator.figures import KINDS
from orchestrator.pareto import CostName
from orchestrator.rows import TrialRow
from orchestrator.store import ResultStore

SMALL = [block for block in made_studies.WIDTH if block[1]["model.width"] <= 2]
VOID = {"meta", "img", "br", "link", "wbr"}
FILE = """\
name: made
# <script>alert("a comment")</script> & "more"
baseline: vanilla
ensembles: [{of: Cut-MixMo, members: [2]}]
price: {gpu_hour: 2.5, currency: EUR}
published:
  - {label: "A <b>paper</b>", top1: 0.8, source: "Table 1"}
"""


class Page(HTMLParser):
    """Holds the page to its grammar as it reads it, and keeps what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.captions: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "caption":
            self.captions.append("")
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        data = data.replace("\u00a0", " ")  # which hold a mean and its deviation together on paper
        self.text += data
        if "caption" in self.open:
            self.captions[-1] += data
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def all(self, tag: str, attribute: str) -> list[str]:
        return [given[attribute] or "" for name, given in self.tags if name == tag and attribute in given]


def spoiled(row: TrialRow) -> TrialRow:
    """Some trials have failed, with markup in all that they say; others still wait."""
    if row.position in (3, 9):
        trace = "Traceback\n<img src=x onerror=alert(1)>"
        return row.replace(state="ERROR", metrics=NOTHING, error=trace, error_cause="<i>out of memory</i>", epoch=1)
    return row.replace(state="PENDING", metrics=NOTHING, epoch=0, hosts=None) if row.position > 13 else row


def with_logits(store: ResultStore, trials: list[TrialRow], *, text: str = FILE, done: bool = True) -> list[TrialRow]:
    """The trials in a store, those that finished with logits."""
    written = []
    for row in trials:
        if row.state == "TERMINATED":
            stored = made_studies.some_logits(row.position, M=row.config["model_subnetworks"])
            row = row.replace(logits=store.attempt(row.trial_id, 1, 1, "token").put_logits(stored))
        written.append(row)
    made_studies.stored(store, written, text, done=done)
    return written


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def mixmo(capsys: pytest.CaptureFixture[str]) -> "Mixmo":
    return Mixmo(capsys)


class Mixmo:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.err = ""

    def __call__(self, words: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(words.split())
        out, self.err = self.capsys.readouterr()
        assert ended.value.code == code, self.err
        return out


def the_page(mixmo: Mixmo, words: str = "report made") -> tuple[str, Page]:
    text = Path(mixmo(words).strip()).read_text()
    return text, Page(text)


# ------------------------------------------------------------------------------------------------------------ the page


def test_on_paper_a_mean_is_told_on_two_lines_at_most_and_a_name_breaks_between_its_words(mixmo: Mixmo) -> None:
    with_logits(ResultStore.open("results", create=True), made_studies.rows(SMALL))
    text, _ = the_page(mixmo)
    assert "subnetwork_<wbr>top1_<wbr>mean" in text
    assert re.search(r"<td class=.n.>\d+\.\d+ ±\u00a0\d+\.\d+\u00a0\(3\)</td>", text)


def test_a_page_needs_nothing_beside_it_and_is_the_same_each_time(mixmo: Mixmo) -> None:
    with_logits(ResultStore.open("results", create=True), made_studies.rows(SMALL))
    text, page = the_page(mixmo)
    assert the_page(mixmo, "report made --out again.html")[0] == text
    assert not re.search(r"""(src|href|action|data)\s*=\s*["']?\s*(https?:)?//|@import|url\(|<script|<link""", text)
    links = page.all("img", "src") + page.all("a", "href")
    assert all(link.startswith(("data:", "#")) for link in links)
    assert {link[1:] for link in links if link.startswith("#")} <= set(page.all("h2", "id"))
    assert str(Path.cwd()) not in text
    for source in page.all("img", "src"):
        image = base64.b64decode(source.removeprefix("data:image/svg+xml;base64,")).decode()
        assert image.lstrip().startswith("<?xml")
        assert not re.search(r"""href="(?!#|data:)""", image)


def test_a_page_can_be_read_without_seeing_it(mixmo: Mixmo) -> None:
    with_logits(ResultStore.open("results", create=True), made_studies.rows(SMALL))
    _, page = the_page(mixmo)
    images = [given for tag, given in page.tags if tag == "img"]
    assert images
    assert all(len(given["alt"] or "") > 20 for given in images)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert sum(tag == "caption" for tag, _ in page.tags) == len(page.tables)
    assert ("html", {"lang": "en"}) in page.tags


def test_the_numbers_are_those_of_the_table(mixmo: Mixmo) -> None:
    with_logits(ResultStore.open("results", create=True), made_studies.rows(SMALL, change=spoiled))
    _, page = the_page(mixmo)
    wanted = mixmo("table made --format csv")
    (link,) = [href for href in page.all("a", "href") if href.startswith("data:")]
    assert base64.b64decode(link.removeprefix("data:text/csv;base64,")).decode() == wanted
    header, *lines = page.tables[0]
    records = list(csv.DictReader(io.StringIO(wanted)))
    assert len(lines) == len(records)
    for line, record in zip(lines, records, strict=True):
        shown = dict(zip(header, line, strict=True))
        assert shown["label"] == record["label"]
        if not record["mean"]:
            assert shown["top1 %"] == "... (0/3)"
            continue
        mean = f"{100 * float(record['mean']):.2f}"
        std = f" ± {100 * float(record['std']):.2f}" if record["std"] else ""
        planned = "" if record["n"] == record["planned"] else f"/{record['planned']}"
        assert shown["top1 %"] == f"{mean}{std} ({record['n']}{planned})"
        if record["ci_low"]:
            low, high = (f"{100 * float(record[name]):.2f}" for name in ("ci_low", "ci_high"))
            assert shown["95 % interval"] == f"{low} to {high}"
    assert any("2 x Cut-MixMo" in line for line in lines)


def test_whatever_a_sweep_says_stays_text(mixmo: Mixmo) -> None:
    blocks: list[made_studies.Block] = [
        ("</table><script>x</script>", {"model.width": 1}),
        ("vanilla", {"model.width": 2}),
    ]
    with_logits(ResultStore.open("results", create=True), made_studies.rows(blocks, seeds=2), text=FILE)
    text, page = the_page(mixmo)
    assert "<script" not in text
    assert "</table><script>x</script>" in page.text
    assert '<script>alert("a comment")</script> & "more"' in page.text


def test_failures_are_grouped_by_cause_with_an_error_to_read(mixmo: Mixmo) -> None:
    with_logits(ResultStore.open("results", create=True), made_studies.rows(SMALL, change=spoiled))
    text, page = the_page(mixmo)
    assert "<i>out of memory</i>: 2 trials" in page.text
    assert "<img src=x onerror=alert(1)>" in page.text
    assert "<i>out" not in text


def test_a_page_of_an_unfinished_sweep_says_so_first(mixmo: Mixmo) -> None:
    rows = made_studies.rows(SMALL, change=spoiled)
    with_logits(ResultStore.open("results", create=True), rows, done=False)
    _, page = the_page(mixmo)
    told = " ".join(page.text.split())
    assert "Not finished: 4 of 18 trials run or wait. All below is right for the 12 trials that have finished" in told
    assert told.index("Not finished") < told.index("Results")
    assert ("p", {"class": "state open", "role": "status"}) in page.tags


def test_a_page_of_a_sweep_without_results_is_a_page(mixmo: Mixmo) -> None:
    sampled(Path("results"), "beginning")
    _, page = the_page(mixmo, f"report {NAME}")
    assert "Nothing to draw yet" in page.text


def test_a_page_says_what_was_run(mixmo: Mixmo) -> None:
    rows = with_logits(ResultStore.open("results", create=True), made_studies.rows(SMALL))
    _, page = the_page(mixmo)
    for text in ("0123abc", "2.14.1", "2.60.0", "node-1", "21 November 2026, 12:00 UTC", "cifar10", FILE.strip()):
        assert text in page.text
    assert all(row.trial_id in page.text for row in rows)
    assert "EUR for training" in page.text


def test_what_a_cell_took_is_told_of_trials_that_went_to_their_end(mixmo: Mixmo) -> None:
    """One that a scheduler stopped early took a part of what a trial takes."""
    rows = made_studies.rows(SMALL)

    def halved(row: TrialRow) -> TrialRow:
        part = row.replace(stopped_early=True, train_flops=(row.train_flops or 0.0) / 2)
        return part if row.trial_id == rows[0].trial_id else row

    with_logits(ResultStore.open("results", create=True), [halved(row) for row in rows])
    _, page = the_page(mixmo)
    (took,) = (each for each in page.tables if "FLOPs a trial" in each[0])
    trials, finished, flops = (took[0].index(name) for name in ("trials", "finished", "FLOPs a trial"))
    assert (took[1][trials], took[1][finished]) == ("3", "2")
    assert took[1][flops] == f"{rows[0].train_flops:.3g}"


def quick(row: TrialRow) -> TrialRow:
    return row.replace(sweep="made-quick")


def steered(row: TrialRow) -> TrialRow:
    """By ASHA, which stopped two trials, or by a population: what the page has to say of both."""
    return row.replace(stopped_early=row.position < 2, lineage="{}")


@pytest.mark.parametrize(
    ("change", "told"),
    [(quick, ["quick form, not comparable"]),
     (steered, ["without 2 trials that a scheduler stopped early",
                "populations: settings are those that trials began with"])],
)  # fmt: skip
def test_what_heads_the_table_heads_every_table_of_the_page(
    mixmo: Mixmo, change: Callable[[TrialRow], TrialRow], told: list[str]
) -> None:
    rows = [change(row) for row in made_studies.rows(SMALL[:2])]
    with_logits(ResultStore.open("results", create=True), rows, text=FILE.replace("Cut-MixMo", "vanilla"))
    name = rows[0].sweep
    _, heading, *_ = mixmo(f"table {name} --format markdown").split("**")
    assert all(each in heading for each in told)
    text, page = the_page(mixmo, f"report {name}")
    assert len(page.captions) == len(page.tables) >= 4
    assert all(caption.startswith(heading) for caption in page.captions)
    assert heading in text[text.index('<p class="state') : text.index("</p>")]
    shown = re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL)  # the sweep file, as it was given
    assert ("paper&lt;/b" in shown) == ("80.00" in shown) == (name == "made")


def test_several_sweeps_make_one_page(mixmo: Mixmo) -> None:
    store = ResultStore.open("results", create=True)
    made_studies.stored(store, made_studies.rows(SMALL, name="one"))
    made_studies.stored(store, made_studies.rows(made_studies.SUBNETWORKS, name="two"))
    text, page = the_page(mixmo, "report one two")
    assert Path("one+two.html").read_text() == text
    assert "The sweep file of one" in page.text
    assert "The sweep file of two" in page.text


# --------------------------------------------------------------------------------------------------------- commands


@pytest.fixture
def made() -> ResultStore:
    store = ResultStore.open("results", create=True)
    with_logits(store, made_studies.rows(SMALL))
    return store


def test_figures_are_drawn_and_what_is_left_out_is_told(mixmo: Mixmo, made: ResultStore) -> None:
    out = mixmo("figures made --only accuracy,width,probability --format svg,pdf")
    names = ["accuracy.svg", "accuracy.pdf", "width.svg", "width.pdf"]
    assert out.splitlines() == [f"figures/made/{name}" for name in names]
    assert mixmo.err.splitlines() == [
        *(f"note: 2 x Cut-MixMo w={width}: the last 1 of 3 seeds are left out" for width in (1, 2)),
        "note: no probability: no cells differ in mixing.probability alone",
    ]
    assert "2 x Cut-MixMo" in Path("figures/made/width.svg").read_text()
    mixmo("figures made --only width --format svg --no-ensembles")
    assert "2 x" not in mixmo.err + Path("figures/made/width.svg").read_text()
    document = json.loads(mixmo("figures made --only accuracy,gallery --format png --json"))
    assert document["schema"] == "mixmo.figures/1"
    assert document["files"] == ["figures/made/accuracy.png", "figures/made/gallery.png"]


def test_the_help_names_every_kind_and_every_cost(mixmo: Mixmo) -> None:
    help_text = mixmo("figures --help")
    assert all(kind in help_text for kind in KINDS)
    assert get_args(drawing.Cost) == get_args(CostName)


def test_the_front_in_each_form(mixmo: Mixmo, made: ResultStore) -> None:
    terminal = mixmo("pareto made")
    assert "GPU-hours of training" in terminal
    assert "2 x Cut-MixMo" in terminal
    assert "2 x Cut-MixMo" not in mixmo("pareto made --no-ensembles")
    assert "At 2.5 EUR an hour." in mixmo("pareto made --cost money")
    assert "At 4 EUR an hour." in mixmo("pareto made --cost money --price 4")
    document = json.loads(mixmo("pareto made --format json --cost parameters"))
    assert document["schema"] == "mixmo.pareto/1"
    assert {cell["n"] for cell in document["cells"]} == {1, 3}
    assert len(list(csv.DictReader(io.StringIO(mixmo("pareto made --format csv"))))) == len(document["cells"])
    mixmo("pareto made --out drawn/front.svg --cost inference_flops")
    assert Path("drawn/front.svg").stat().st_size > 5000


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("figures nothing", 5, "no sweep nothing"),
        ("figures made --only heigth", 2, "no figure heigth"),
        ("figures made --format gif", 2, "no format gif"),
        ("pareto made --out front.gif", 2, "the suffix decides"),
        ("pareto made --metric temperature", 2, "neither more nor less is better"),
        ("report made --out page.txt", 2, "the suffix decides"),
        (
            "report made --out results/sweeps/made/sweep.yaml/x.html",
            7,
            "name another with --out",
        ),
    ],
)
def test_what_is_refused_is_one_clear_message(
    mixmo: Mixmo, made: ResultStore, words: str, code: int, message: str
) -> None:
    assert mixmo(words, code=code) == ""
    assert message in mixmo.err
    assert "Traceback" not in mixmo.err


# --------------------------------------------------------------------------------------------------------- a browser


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the page of `mixmo report` in")
def test_a_browser_without_a_network_shows_the_page(mixmo: Mixmo, made: ResultStore, tmp_path: Path) -> None:
    from PIL import Image

    the_page(mixmo)
    for width in (500, 1200):
        shot = tmp_path / f"{width}.png"
        subprocess.run(
            [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
             f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND",
             f"--window-size={width},4000", f"--screenshot={shot}", (tmp_path / "made.html").as_uri()],
            capture_output=True, timeout=120, check=True,
        )  # fmt: skip
        with Image.open(shot) as image:
            assert image.size == (width, 4000)
            grey = image.convert("L")
        for top in range(0, 4000, 1000):  # something stands on every part of the page, and on paper
            low, high = grey.crop((0, top, width, top + 1000)).getextrema()
            assert (low < 100, high) == (True, 255)  # type: ignore[operator]
