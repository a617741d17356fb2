"""Where a search's next stage comes from."""

from service.sources import InTurn, Planned, Proposed
from service.tpe import Told


def drain(source):
    stages = []
    while (stage := source.next()) is not None:
        stages.append(stage)
    return stages


class Study:
    """A search over whole numbers that counts up; every second number is not allowed."""

    def __init__(self, known=(), num=5, first=()):
        self.told = [Told({"n": n}, "done", 0.0) for n in known]
        self.source = Proposed(
            num=num,
            first=first,
            history=lambda: self.told,
            propose=lambda history, attempt: {"n": len(history) + attempt},
            expand=self.expand,
        )

    def expand(self, point):
        if point["n"] % 2 or any(told.point == point for told in self.told):
            return []
        self.told.append(Told(point, "running"))
        return [f"{point['n']}a", f"{point['n']}b"]


def test_a_plan_is_handed_out_in_its_order_once():
    assert drain(Planned([3, 1, 2])) == [3, 1, 2]


def test_proposals_end_when_as_many_points_are_known_as_were_asked_for():
    study = Study(num=3)
    assert drain(study.source) == ["0a", "0b", "2a", "2b", "4a", "4b"]
    assert len(study.told) == 3


def test_points_that_an_earlier_run_knew_count_and_are_not_run_again():
    assert drain(Study(known=(0, 2), num=3).source) == ["4a", "4b"]


def test_what_an_earlier_run_left_open_comes_first_and_counts():
    study = Study(known=(6,), num=2, first=("6b",))
    assert drain(study.source) == ["6b", "2a", "2b"]


def test_a_space_that_is_used_up_ends_the_search():
    source = Proposed(
        num=10,
        first=(),
        history=list,
        propose=lambda history, attempt: {"n": attempt},
        expand=lambda point: [],
    )
    assert drain(source) == []


def test_several_sources_take_turns_and_the_longer_one_goes_on_alone():
    assert drain(InTurn([Planned("abc"), Planned("x")])) == ["a", "x", "b", "c"]
