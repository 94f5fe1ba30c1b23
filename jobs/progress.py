"""One progress bar for every job: rows done, rows per second, time left; silent where output is not a terminal
except for a line every half minute."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

LINE_EVERY_SECONDS = 30.0


@contextlib.contextmanager
def progress_bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of rows that came in."""
    if not sys.stderr.isatty():
        yield _lines(name, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.1f}/s"),
        TimeRemainingColumn(),
    )
    start = time.perf_counter()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=total, rate=0.0)
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            bar.update(task, advance=count, rate=done / (time.perf_counter() - start))

        yield advance


def _lines(name: str, total: int) -> Callable[[int], None]:
    start = last = time.perf_counter()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.perf_counter()
        if now - last >= LINE_EVERY_SECONDS or done >= total:
            last = now
            rate = done / (now - start)
            eta = (total - done) / max(rate, 1e-9)
            print(f"{name}: {done}/{total}, {rate:.1f}/s, {eta:.0f} s left", file=sys.stderr, flush=True)

    return advance
