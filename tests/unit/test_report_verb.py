"""`fairway report`: where its page goes."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.cli import app
from service.ledger import replay
from service.report_page import report_html
from tests.ledgers import PRUNE, Sweep
from trainer.errors import UsageError


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    made = Sweep(tmp_path / "home", space={PRUNE: [0.0, 0.05]})
    made.write()
    return made


def report(sweep: Sweep, output: Path | str):
    words = ["report", "--home", str(sweep.home), "-o", str(output)]
    return CliRunner().invoke(app, words)


def test_a_file_that_ends_in_html_gets_the_page_and_nothing_else_is_written(
    sweep: Sweep, tmp_path: Path
) -> None:
    page = tmp_path / "new" / "report.html"

    done = report(sweep, page)

    assert done.exit_code == 0
    assert done.stdout == ""
    assert page.read_text().startswith("<!doctype html>")
    assert not sweep.paths.sweep(sweep.sweep_id).report.exists()


def test_json_still_prints_the_finals(sweep: Sweep) -> None:
    done = report(sweep, "json")

    assert done.stdout.lstrip().startswith("[")
    assert sweep.paths.sweep(sweep.sweep_id).report.joinpath("report.html").is_file()


@pytest.mark.parametrize("output", ["html", "report.pdf", ".", "a.html/"])
def test_any_other_output_is_a_usage_error_in_one_line(output: str, sweep: Sweep) -> None:
    Path(sweep.home / "a.html").mkdir(exist_ok=True)
    place = sweep.home / output if output.startswith("a.") else output

    done = report(sweep, place)

    assert isinstance(done.exception, UsageError)
    assert "table, json, yaml, or a file that ends in .html" in str(done.exception)
    assert "\n" not in str(done.exception)


def test_a_page_is_the_one_that_the_service_draws(sweep: Sweep, tmp_path: Path) -> None:
    report(sweep, tmp_path / "page.html")

    view = replay(sweep.paths.sweep(sweep.sweep_id).ledger)
    assert (tmp_path / "page.html").read_text() == report_html(view, sweep.paths)
