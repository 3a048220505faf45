"""What a person sees in TensorBoard of a real, short run with `KernelTime`: asked over HTTP, and seen in Chromium."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lit_symopt.callbacks import KernelTime
from tests.models.tiny import Sequences, tiny, trainer
from tests.profiling.boards import PLUGIN, Board, tensorboard
from tests.profiling.browser import CHROMIUM, Page, chromium
from tests.profiling.traces import Made

RUN, TRACES, CUDA = "real/version_0", "real/version_0/traces", "made_by_hand"
PICTURES = ("profile/cost", "profile/timeline", "profile/roofline", "profile/memory")
CHOICES = ".MuiSelect-root[aria-haspopup=listbox]"
NAMES_OF_VIEWS = ["Overview", "Operator", "Trace", "Memory"]


@dataclass(frozen=True)
class Seen:
    """A TensorBoard that has read everything."""

    board: Board
    folder: Path


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """Two windows of a tiny mixture; its first trace a second time, as if of rank 1; and a made up trace of a GPU.

    Real traces of two ranks are in `tests/callbacks/test_kernel_time_ranks.py`; the plugin goes by the file's name.
    """
    folder = tmp_path_factory.mktemp("logs")
    logger = TensorBoardLogger(folder, name="real")
    callback = KernelTime(wait=1, warmup=1, active=2, repeat=2)
    run = trainer(folder, max_steps=8, max_epochs=-1, limit_val_batches=0, logger=logger, callbacks=[callback])
    run.fit(tiny("olmoe"), Sequences(count=40))
    traces = sorted((folder / TRACES).iterdir())
    assert len(traces) == 2
    (folder / TRACES / traces[0].name.replace("rank0.", "rank1.", 1)).write_bytes(traces[0].read_bytes())
    (folder / CUDA).mkdir()
    (folder / CUDA / "rank0.1700000000000000000.pt.trace.json").write_text(json.dumps(on_a_gpu().document()))
    with tensorboard(folder) as board:

        def has_read() -> bool:
            runs = board.profiler("runs")
            return not runs["loading"] and len(runs["runs"]) == 2 and "images" in board.json("plugins_listing")

        board.until(has_read)
        board.until(lambda: set(PICTURES) <= set(board.json("plugin/images/tags").get(RUN, {})))
        yield Seen(board, folder)


def on_a_gpu() -> Made:
    """Synthetic: no GPU was here to record one."""
    made = Made()
    for number in range(3):
        at = 1000.0 * number
        made.note(f"ProfilerStep#{number}", at, at + 900)
        made.note("symopt/step", at + 100, at + 800)
        made.note("symopt/query/spectral/rule", at + 200, at + 700, elements=(4096,))
        made.op("aten::bmm", at + 250, at + 400, external=7 + number)
        made.launch(20 + number, at + 300, at + 320)
        made.kernel("sm90_xmma_gemm_bf16", at + 350, at + 650, correlation=20 + number, external=7 + number)
    return made


# -- torch's plugin, over HTTP -----------------------------------------------------------------------------------------


def test_the_plugin_finds_the_traces_where_the_callback_wrote_them(seen: Seen) -> None:
    assert set(seen.board.profiler("runs")["runs"]) == {TRACES, CUDA}
    assert seen.board.json("plugins_listing")[PLUGIN]["enabled"]
    assert seen.board.profiler("views", run=TRACES) == NAMES_OF_VIEWS


def test_each_rank_is_a_worker_and_each_window_a_span(seen: Seen) -> None:
    for view in NAMES_OF_VIEWS:
        assert seen.board.profiler("workers", run=TRACES, view=view) == ["rank0", "rank1"]
    assert seen.board.profiler("spans", run=TRACES, worker="rank0") == ["1", "2"]
    assert len(seen.board.profiler("spans", run=TRACES, worker="rank1")) == 1


@pytest.mark.parametrize("span", ["1", "2"])
def test_the_table_of_operators_has_the_products_of_the_rules(seen: Seen, span: str) -> None:
    where = {"run": TRACES, "worker": "rank0", "span": span, "view": "Operator"}
    rows = seen.board.profiler("operation/table", **where, group_by="Operation")["data"]
    found = {row["name"]: row for row in rows}
    assert {"aten::bmm", "aten::linalg_eigh", "aten::mm"} <= set(found)
    assert found["aten::bmm"]["calls"] > 0
    assert found["aten::bmm"]["host_self_duration"] > 0


def test_the_trace_of_every_span_has_the_ranges_of_the_optimizer(seen: Seen) -> None:
    for span in ("1", "2"):
        names = {event.get("name") for event in trace(seen.board, run=TRACES, worker="rank0", span=span)}
        assert {"symopt/step", "symopt/router/left_spectral/rule", "symopt/lm_head/row_then_spectral/rule"} <= names
        assert {"train/data", "train/forward", "train/backward", "train/optimizer"} <= names
        assert len([name for name in names if str(name).startswith("ProfilerStep#")]) == 2


def test_every_step_of_a_window_is_in_the_plugins_overview(seen: Seen) -> None:
    overview = seen.board.profiler("overview", run=TRACES, worker="rank0", span="1", view="Overview")
    assert len(overview["steps"]["rows"]) == 2


def test_a_trace_of_a_gpu_has_a_table_of_kernels(seen: Seen) -> None:
    assert "Kernel" in seen.board.profiler("views", run=CUDA)
    where = {"run": CUDA, "worker": "rank0", "span": "1"}
    [name_column, *_] = (table := seen.board.profiler("kernel/table", **where, group_by="Kernel"))["data"]["columns"]
    assert name_column["name"] == "Name"
    assert [row[0] for row in table["data"]["rows"]] == ["sm90_xmma_gemm_bf16"]
    names = {event.get("name") for event in trace(seen.board, **where)}
    assert {"symopt/query/spectral/rule", "sm90_xmma_gemm_bf16"} <= names


def trace(board: Board, **where: str) -> list[dict[str, Any]]:
    content = board.get(f"plugin/{PLUGIN}/trace", **where)
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    events: list[dict[str, Any]] = json.loads(content)["traceEvents"]
    return events


# -- what the callback logs, over HTTP ---------------------------------------------------------------------------------


def test_scalars_have_a_point_a_window(seen: Seen) -> None:
    tags = seen.board.json("plugin/scalars/tags")[RUN]
    assert {"profile/step_ms", "profile/optimizer_ms", "profile/ms/router", "profile/attributed_share"} <= set(tags)
    for tag in ("profile/step_ms", "profile/ms/router"):
        points = seen.board.json("plugin/scalars/scalars", run=RUN, tag=tag)
        assert len(points) == 2
        assert all(value > 0 for _, _, value in points)


def test_the_table_is_shown_as_a_table(seen: Seen) -> None:
    [tag] = seen.board.json("plugin/text/tags")[RUN]
    shown = seen.board.json("plugin/text/text", run=RUN, tag=tag)
    assert len(shown) == 2
    for entry in shown:
        assert entry["text"].count("<table>") == 1 + 2  # the writer puts a text into a table of its own
        assert "<td>router</td>" in entry["text"]
        assert "<td>(unattributed)</td>" in entry["text"]
        assert "**" not in entry["text"]


def test_pictures_are_png_files_small_enough_to_be_read_at_once(seen: Seen) -> None:
    from PIL import Image

    for tag, number in zip(PICTURES, (2, 2, 1, 1), strict=True):
        entries = seen.board.json("plugin/images/images", run=RUN, tag=tag, sample="0")
        assert len(entries) == number
        picture = Image.open(BytesIO(seen.board.get(f"plugin/images/individualImage?{entries[0]['query']}")))
        assert picture.format == "PNG"
        assert picture.width <= 1400
        assert picture.height <= 900


# -- in a browser without a network ------------------------------------------------------------------------------------

in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (`chromium` or `google-chrome`) on the PATH")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@in_a_browser
def test_the_browser_draws_every_picture(seen: Seen, page: Page) -> None:
    page.goto(f"{seen.board.url}/#images")
    page.until(f"all('img').filter(image => image.naturalWidth > 600 && visible(image)).length == {len(PICTURES)}")
    for tag in PICTURES:
        assert tag in page.text()


@in_a_browser
def test_the_browser_shows_the_table_with_its_cells(seen: Seen, page: Page) -> None:
    page.goto(f"{seen.board.url}/#text")
    page.until("all('td').some(cell => visible(cell) && cell.innerText == 'left_spectral')")
    cells = page.evaluate("all('td').filter(visible).map(cell => cell.innerText)")
    assert {"router", "lm_head", "row_then_spectral", "(unattributed)", "training step (wall)"} <= set(cells)
    assert {"ms/step", "% update", "% step"} <= set(page.evaluate("all('th').filter(visible).map(e => e.innerText)"))


@in_a_browser
def test_the_browser_draws_the_scalars(seen: Seen, page: Page) -> None:
    page.goto(f"{seen.board.url}/#scalars&tagFilter=profile%2Fms%2Frouter")
    page.until(
        "all('path').filter(path => visible(path) && path.getRootNode().host?.tagName == 'VZ-LINE-CHART2')"
        ".some(path => /^M[^L]+L[^L]+$/.test(path.getAttribute('d')))"  # a line through two points
    )
    assert "profile/ms/router" in page.text()


@in_a_browser
def test_of_torchs_plugin_only_what_to_choose_from_is_shown_without_a_network(seen: Seen, page: Page) -> None:
    page.goto(f"{seen.board.url}/#{PLUGIN}")
    chosen = page.until(
        f"(words => words.length == 4 && words.every(word => /\\w/.test(word)) && words)"
        f"(all('{CHOICES}').map(choice => choice.innerText.trim()))"
    )
    assert chosen[0] in (TRACES, CUDA)
    assert chosen[1:] == ["Overview", "rank0", "1"]
    assert options(page, 0) == {TRACES, CUDA}
    choose(page, 0, TRACES)
    page.until(f"all('{CHOICES}')[0].innerText == '{TRACES}'")
    assert options(page, 1) == set(NAMES_OF_VIEWS)
    assert options(page, 2) == {"rank0", "rank1"}
    assert options(page, 3) == {"1", "2"}
    for view in NAMES_OF_VIEWS:
        choose(page, 1, view)
        page.until(f"all('{CHOICES}')[1].innerText == '{view}'")
        assert page.evaluate("all('[role=progressbar]').filter(visible).length") == 1  # waits for Google's charts
    asked = page.evaluate(
        "all('iframe')[0].contentWindow.performance.getEntriesByType('resource').map(entry => entry.name)"
    )
    assert [url for url in asked if "127.0.0.1" not in url] == ["https://www.gstatic.com/charts/loader.js"]


def options(page: Page, number: int) -> set[str]:
    """What a choice offers; it is closed again as it was."""
    shown = _opened(page, number)
    page.evaluate("all('li[role=option][aria-selected=true]')[0].click()")
    page.until("all('li[role=option]').length == 0")
    return set(shown)


def choose(page: Page, number: int, name: str) -> None:
    _opened(page, number)
    page.evaluate(f"all('li[role=option]').find(option => option.innerText.trim() == '{name}').click()")
    page.until("all('li[role=option]').length == 0")


def _opened(page: Page, number: int) -> list[str]:
    press = "new MouseEvent('mousedown', {bubbles: true, button: 0})"
    page.evaluate(f"all('{CHOICES}')[{number}].dispatchEvent({press})")
    shown: list[str] = page.until("all('li[role=option]').map(option => option.innerText.trim())")
    return shown
