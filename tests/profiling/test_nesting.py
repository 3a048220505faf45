"""Intervals nest as they were opened, whatever their ends say. Oracle: looking at every instant by itself."""

from hypothesis import given
from hypothesis import strategies as st

from lit_symopt.profiling.nesting import NONE, nest

Intervals = list[tuple[int, int]]


def intervals(longest: int = 30) -> st.SearchStrategy[Intervals]:
    """Of any kind: nested, touching, crossing, empty, equal."""
    pair = st.tuples(st.integers(0, longest), st.integers(0, longest)).map(lambda ends: (min(ends), max(ends)))
    return st.lists(pair, max_size=12).map(lambda found: sorted(found, key=lambda pair: (pair[0], -pair[1])))


def owner(found: Intervals, time: int) -> int:
    """The last to begin among those open at a time."""
    return max((index for index, (start, end) in enumerate(found) if start <= time < end), default=NONE)


@given(intervals())
def test_every_instant_belongs_to_the_last_opened(found: Intervals) -> None:
    nesting = nest([start for start, _ in found], [end for _, end in found])
    owners = [owner(found, time) for time in range(31)]
    assert [nesting.at(time) for time in range(31)] == owners
    assert nesting.own == [owners.count(index) for index in range(len(found))]


@given(intervals())
def test_the_parent_is_open_when_the_child_begins(found: Intervals) -> None:
    nesting = nest([start for start, _ in found], [end for _, end in found])
    for index, parent in enumerate(nesting.parents):
        earlier = found[:index]
        assert parent == owner(earlier, found[index][0])


def test_before_and_after_everything_is_nothing() -> None:
    nesting = nest([5], [8])
    assert [nesting.at(4), nesting.at(5), nesting.at(8)] == [NONE, 0, NONE]
    assert nest([], []).at(3) == NONE
