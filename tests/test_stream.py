"""experiments.stream: everything in order, made ahead, and never more than asked for."""

import threading

import pytest

from experiments.stream import prefetch


def test_it_is_map() -> None:
    assert list(prefetch(lambda x: x * x, range(10))) == [x * x for x in range(10)]
    assert list(prefetch(str, [])) == []


@pytest.mark.parametrize('ahead', [1, 2, 5])
def test_it_works_ahead_and_not_further(ahead: int) -> None:
    made, reached = [], threading.Event()

    def make(item: int) -> int:
        made.append(item)
        if item == ahead:
            reached.set()
        return item

    results = prefetch(make, range(100), ahead)
    assert next(results) == 0
    assert reached.wait(10)  # made by the thread while the first is in use
    assert next(results) == 1
    results.close()
    assert max(made) <= ahead + 1


def test_an_error_comes_when_its_result_is_due() -> None:
    def make(item: int) -> int:
        if item == 2:
            raise KeyError(item)
        return item

    results = prefetch(make, range(5))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(KeyError):
        next(results)
