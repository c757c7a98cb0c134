"""Work done ahead of its use, so that the device never waits for data."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar('Item')
Made = TypeVar('Made')


def prefetch(make: Callable[[Item], Made], items: Iterable[Item], ahead: int = 2) -> Iterator[Made]:
    """``map(make, items)``, with the next few made by a thread while one is in use.

    Args:
      make: what takes long, such as gathering a batch and sending it to the device.
      items: what to make it from.
      ahead: how many may wait; as many results are held in memory.

    Raises:
      Whatever ``make`` raises, when its result is due.

    Example:
      >>> list(prefetch(str.upper, 'abc'))
      ['A', 'B', 'C']
    """
    waiting: collections.deque[Future[Made]] = collections.deque()
    with ThreadPoolExecutor(1) as worker:
        try:
            for item in items:
                waiting.append(worker.submit(make, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
