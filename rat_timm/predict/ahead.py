"""Reading ahead: what is wanted next is read in another thread while the model computes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(jobs: Iterable[Callable[[], T]], count: int) -> Iterator[T]:
    """Yields what jobs return, in their order; at most ``count`` are done or wait before they are wanted."""
    with ThreadPoolExecutor(1) as thread:
        waiting: deque[Future[T]] = deque()
        try:
            for job in jobs:
                waiting.append(thread.submit(job))
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class Behind:
    """Does one thing at a time in another thread; an error comes with the next thing or at the end."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._last: Future | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Waits for what was started before, and starts another."""
        self.wait()
        self._last = self._thread.submit(job)

    def wait(self) -> None:
        """Waits for what was started last."""
        last, self._last = self._last, None
        if last is not None:
            last.result()
