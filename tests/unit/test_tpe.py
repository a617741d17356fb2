"""The next point of a search, from what is known of the others."""

import pytest

from service.tpe import Told, propose
from tune_spaces.axes import Axis

AXES = {
    "x": Axis(min=0.0, max=1.0),
    "n": Axis(min=1, max=1000, scale="log"),
    "kind": Axis(values=("plain", "deep")),
    "depth": Axis(min=1, max=9),
}
WHOLE = {"n", "depth"}


def suggest(ask):
    point = {path: ask(path, AXES[path], path in WHOLE) for path in ("x", "n", "kind")}
    if point["kind"] == "deep":  # an axis that another one switches
        point["depth"] = ask("depth", AXES["depth"], True)
    return point


def loss(point):
    return (point["x"] - 0.3) ** 2 + 0.1 * (point["kind"] == "plain")


def search(num, seed=0, tell=lambda point: Told(point, "done", loss(point)), history=()):
    history = list(history)
    while len(history) < num:
        history.append(tell(propose(history, AXES, suggest, (seed, 0), startup=8)))
    return history


def test_points_are_inside_their_axes_and_whole_where_they_must_be():
    for told in search(20):
        assert 0.0 <= told.point["x"] <= 1.0
        assert isinstance(told.point["n"], int)
        assert 1 <= told.point["n"] <= 1000
        assert ("depth" in told.point) == (told.point["kind"] == "deep")


def test_the_same_history_gives_the_same_next_point_in_another_process_too():
    whole = search(24)
    resumed = search(24, history=[Told(t.point, t.state, t.value) for t in whole[:13]])
    assert [t.point for t in resumed] == [t.point for t in whole]


def test_another_seed_or_attempt_gives_another_point():
    history = search(12)
    points = [propose(history, AXES, suggest, seed, startup=8) for seed in ((0, 0), (0, 1), (1, 0))]
    assert points[0] != points[1]
    assert points[0] != points[2]


def test_it_learns_where_values_are_low():
    late = [loss(told.point) for told in search(60)[-20:]]
    early = [loss(told.point) for told in search(60)[:8]]
    assert sum(late) / len(late) < 0.3 * sum(early) / len(early)


def test_a_limit_that_is_broken_keeps_it_away_though_values_are_lower_there():
    def tell(point):
        return Told(point, "done", point["x"], violations={"bytes": 0.5 - point["x"]})

    late = [told.point["x"] for told in search(60, tell=tell)[-20:]]
    assert sum(x >= 0.5 for x in late) >= 12


@pytest.mark.parametrize("state", ["failed", "stopped"])
def test_failed_and_stopped_points_keep_it_away(state):
    def tell(point):
        if point["x"] < 0.5:
            return Told(point, state, None if state == "failed" else 9.0, 4, reason="diverged")
        return Told(point, "done", point["x"])

    late = [told.point["x"] for told in search(60, tell=tell)[-20:]]
    assert sum(x >= 0.5 for x in late) >= 12


def test_points_under_way_keep_others_away_from_where_they_are():
    """Nine workers ask at once, with nothing new to learn: their points must not pile up."""
    known = search(12)

    def spread(remembered):
        told = list(known)
        xs = []
        for attempt in range(9):
            point = propose(told, AXES, suggest, (0, attempt), startup=8)
            xs.append(point["x"])
            if remembered:
                told.append(Told(point, "running"))
        return max(xs) - min(xs)

    assert spread(remembered=True) > spread(remembered=False)
