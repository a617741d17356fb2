"""The pictures and the page of a sweep."""

import io
from pathlib import Path

import pytest
from PIL import Image

from service import plots
from service.groups import coordinates, group_rows, is_far, pareto_front, scored_rows
from service.ledger import SweepView, replay
from service.paths import Paths
from service.report import best
from service.waterfall import SizeStep, best_sizes, size_steps
from tests import tiny
from tests.ledgers import EMA, PRUNE, WARMDOWN, Sweep
from trainer.blueprint import blueprint
from trainer.protocol import ARTIFACT_BYTES_CAP
from trainer.runtime.files import write_json
from trainer.sizes import tensor_sizes


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> SweepView:
    return replay(Sweep(tmp_path_factory.mktemp("home")).write())


def empty_view(folder: Path) -> SweepView:
    sweep = Sweep(folder)
    with sweep.open() as ledger:
        sweep.start(ledger)
        return ledger.view


def test_report_writes_a_picture_a_page_and_a_table(view: SweepView, tmp_path: Path) -> None:
    files = plots.write_report(view, tmp_path / "report")

    assert [file.name for file in files.files()] == [
        "bpb_by_bytes.png", "report.html", "finals.csv",
    ]  # fmt: skip
    with Image.open(files.png) as image:
        assert image.width >= 1_000
    assert files.csv.read_text().count("\n") == 17


def test_picture_is_the_same_each_time(view: SweepView) -> None:
    assert plots.draw_png(view) == plots.draw_png(view)


@pytest.mark.parametrize(
    "sweep",
    [
        {"space": {WARMDOWN: [2500]}},
        {"mean_bytes": 19_000_000},
        {"mean_bytes": 410_000},
        {"cap_bytes": None},
    ],
    ids=["one point", "none feasible", "cap far away", "no cap"],
)
def test_a_picture_is_drawn_for_odd_sweeps(sweep: dict, tmp_path: Path) -> None:
    view = replay(Sweep(tmp_path, **sweep).write())

    image = Image.open(io.BytesIO(plots.draw_png(view)))

    assert len(image.convert("RGB").getcolors(100_000)) > 10


def test_sweep_without_finals_has_a_picture(tmp_path: Path) -> None:
    assert plots.draw_png(empty_view(tmp_path)).startswith(b"\x89PNG")


def test_pareto_front_is_what_no_other_beats(view: SweepView) -> None:
    able = [row for row in scored_rows(view) if row.state == "succeeded"]
    slow = [
        row
        for row in able
        if not any(
            other.artifact_bytes <= row.artifact_bytes
            and other.val_bpb <= row.val_bpb
            and other is not row
            for other in able
        )
    ]

    front = pareto_front(scored_rows(view))

    assert front == sorted(slow, key=lambda row: row.artifact_bytes)


def test_many_values_of_a_number_are_drawn_as_four_ranges(tmp_path: Path) -> None:
    ratios = [round(0.01 * index, 2) for index in range(12)]
    space = {WARMDOWN: [3000], PRUNE: ratios, EMA: [0.997]}
    view = replay(Sweep(tmp_path, mean_bytes=410_000, space=space).write())

    name, groups = group_rows(view, scored_rows(view))

    assert name == "prune.ratio"
    assert [len(group.rows) for group in groups] == [3, 3, 3, 3]


def test_finals_without_the_knob_that_matters_are_a_group_of_their_own(tmp_path: Path) -> None:
    view = replay(Sweep(tmp_path).write())
    for event in view.finals.values():
        if event["point"][WARMDOWN] == 2500:
            del event["point"][WARMDOWN]

    name, groups = group_rows(view, scored_rows(view), "train")

    assert name == "warmdown_iters"
    assert [(group.label, len(group.rows)) for group in groups] == [("3500", 8), ("absent", 8)]


def test_cap_is_drawn_only_near_the_points(view: SweepView) -> None:
    sizes, _ = coordinates(scored_rows(view))

    assert not is_far(sizes, ARTIFACT_BYTES_CAP)
    assert is_far(sizes, 10 * ARTIFACT_BYTES_CAP)


def records() -> list[dict]:
    """A thousand bytes for each tensor of the model that has every part."""
    tensors = tensor_sizes(blueprint(tiny.rich_model()))
    return [{"name": t.name, "role": t.role, "part": t.part, "bytes": 1_000} for t in tensors]


def sized(view: SweepView, store: Path) -> list[SizeStep]:
    """The steps of the best final of a sweep, whose store has its tensors."""
    final = best(view)["final"]
    write_json(store / "finals" / final / "tensors.json", records())
    return best_sizes(view, store)


def test_steps_of_a_size_add_up_to_the_artifact() -> None:
    result = {"weights_bytes": 1_000_000, "code_bytes": 50_000}

    steps = size_steps(records(), result)

    assert sum(step.bytes for step in steps) == 1_050_000
    assert [step.label for step in steps] == [
        "hash tables", "token table", "value embedding",
        "layer 0 attention", "layer 0 mlp", "layer 1 attention", "layer 1 mlp",
        "layer 2 attention", "layer 2 mlp", "layer 3 attention", "layer 3 mlp",
        "small tensors", "header", "code",
    ]  # fmt: skip


def test_layers_of_two_digits_come_in_order() -> None:
    tensors = [
        {"name": f"blocks.{layer}.mlp.up.weight", "part": "mlp", "bytes": 1} for layer in range(12)
    ]

    steps = size_steps(tensors, {"weights_bytes": 12, "code_bytes": 0})

    assert [step.label for step in steps[:12]] == [f"layer {layer} mlp" for layer in range(12)]


def test_report_shows_the_size_by_tensor_of_the_best_final(view: SweepView, tmp_path: Path) -> None:
    paths = Paths(tmp_path)
    sized(view, paths.store)

    files = plots.write_report(view, tmp_path / "report", paths)

    page = files.html.read_text()
    assert "Bytes of the best final" in page
    assert "token table" in page
    assert f"cap {ARTIFACT_BYTES_CAP:,} bytes" in page
    assert files.files()[-1].name == "size_by_tensor.png"
    with Image.open(files.files()[-1]) as image:
        assert image.width >= 1_000


def test_waterfall_is_drawn_without_a_cap(view: SweepView, tmp_path: Path) -> None:
    sizes = sized(view, tmp_path)

    assert plots.draw_sizes(sizes, None) != plots.draw_sizes(sizes, 1_000_000)
    assert plots.draw_sizes(sizes, None) == plots.draw_sizes(sizes, None)


def test_final_whose_stage_is_gone_has_no_sizes(view: SweepView, tmp_path: Path) -> None:
    assert best_sizes(view, tmp_path) == []
    assert best_sizes(empty_view(tmp_path / "home"), tmp_path) == []
