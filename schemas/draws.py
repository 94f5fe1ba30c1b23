"""Which synthetic rows a ratio takes: how many of each class, and in which order.

One order for exports, ratio searches and evaluations, so that a larger ratio contains the smaller one everywhere.
"""

import hashlib
import heapq
from collections.abc import Mapping


def draw_order(request_id: str) -> int:
    """Where a row stands in the order of drawing: 64 bits of a hash of its id."""
    return int.from_bytes(hashlib.sha256(f"export/{request_id}".encode()).digest()[:8], "big")


def share_out(num_real: Mapping[str, int], ratio: float, *, balance: bool) -> dict[str, int]:
    """Synthetic rows wanted per class: about `ratio` × all real rows; grows in every class with `ratio`.

    Without `balance` each class gets `ratio` times its own real rows, rounded. With it the rows go, one by one, to
    the class that has fewest rows by then; a class without real rows takes part.
    """
    if not balance:
        return {label: round(number * ratio) for label, number in num_real.items()}
    targets = dict.fromkeys(num_real, 0)
    heap = [(number, place, label) for place, (label, number) in enumerate(num_real.items())]
    heapq.heapify(heap)
    for _ in range(round(sum(num_real.values()) * ratio)):
        number, place, label = heap[0]
        targets[label] += 1
        heapq.heapreplace(heap, (number + 1, place, label))
    return targets
