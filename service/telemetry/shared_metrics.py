"""Counters, gauges and histograms in memory that the processes of one service share.

The parent maps a block of memory for each of its processes before it forks them. A process writes to its own block, and
any process adds up all blocks. A process that replaces a dead one takes over its block and counts on from there:
nothing grows with the number of restarts, no counter goes back, and no file or folder is needed.
"""

import logging
import mmap
import threading
from array import array
from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

import orjson
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import REGISTRY, Collector
from prometheus_client.utils import floatToGoString

logger = logging.getLogger("service")

BLOCK_BYTES = 2**23  # about 5,000 versions; the system takes memory only for the pages that are written
_WORD = 8
_Labels = tuple[str, ...]
_Values = Mapping[_Labels, Sequence[float]]


class Block:
    """The numbers of one process: how many words are in use, then entries. An entry is two lengths, a key and numbers.

    An entry counts once the words in use include it, so readers and successors find whole entries only, wherever the
    writer was killed.
    """

    def __init__(self, size: int = BLOCK_BYTES) -> None:
        self._memory = mmap.mmap(-1, size)
        self._words = memoryview(self._memory).cast("Q")
        self._cells = memoryview(self._memory).cast("d")
        self._is_full = False
        self.take_over()

    def take_over(self) -> None:
        """Find the entries of the process that used this block before."""
        self._lock = threading.Lock()
        self._entries = dict(self.read())

    def read(self) -> Iterator[tuple[bytes, "memoryview[float]"]]:
        """Return every key and its numbers."""
        place, end = 1, 1 + self._words[0]
        while place < end:
            length, count = self._words[place : place + 2]
            key = self._memory[(place + 2) * _WORD : (place + 2) * _WORD + length]
            first = place + 2 + -(-length // _WORD)
            yield key, self._cells[first : first + count]
            place = first + count

    def open(self, key: bytes, count: int) -> "memoryview[float]":
        """Return the numbers of a key, zeros at first. Where the block is full, they are visible to nobody."""
        with self._lock:
            if key not in self._entries:
                self._entries[key] = self._append(key, count)
            return self._entries[key]

    def _append(self, key: bytes, count: int) -> "memoryview[float]":
        place = 1 + self._words[0]
        first = place + 2 + -(-len(key) // _WORD)
        if first + count > len(self._words):
            if not self._is_full:
                logger.warning("there are too many models for the metrics of one process; new ones are not counted")
            self._is_full = True
            return memoryview(array("d", bytes(count * _WORD)))
        self._words[place], self._words[place + 1] = len(key), count
        self._memory[(place + 2) * _WORD : (place + 2) * _WORD + len(key)] = key
        cells = self._cells[first : first + count]
        cells[:] = array("d", bytes(count * _WORD))  # not zeros where a writer was killed before it was done
        self._words[0] = first + count - 1
        return cells


class _Memory:
    """The blocks of all processes, and the one of this process."""

    def __init__(self) -> None:
        self.own = Block()
        self.blocks = [self.own]


class _Instrument:
    """A metric by name; `_open` returns this process's numbers for some values of the labels."""

    width = 1

    def __init__(
        self,
        name: str,
        documentation: str,
        label_names: Sequence[str] = (),
        combine: Callable[[Iterable[float]], float] = sum,
        is_live: bool = False,
    ) -> None:
        self.name = name
        self.documentation = documentation
        self.label_names = tuple(label_names)
        self.combine = combine
        self.is_live = is_live
        _instruments[name] = self

    def _open(self, labels: _Labels) -> "memoryview[float]":
        return _memory.own.open(orjson.dumps([self.name, *labels]), self.width)

    def build_family(self, values: _Values) -> Metric:
        """Return the samples that Prometheus reads, from the combined numbers of all processes."""
        raise NotImplementedError


class Counter(_Instrument):
    """A number that only rises."""

    def add(self, amount: float, *labels: str) -> None:
        """Raise it."""
        self._open(labels)[0] += amount

    def build_family(self, values: _Values) -> Metric:
        """Return its samples."""
        family = CounterMetricFamily(self.name, self.documentation, labels=self.label_names)
        for labels, (value,) in values.items():
            family.add_metric(labels, value)
        return family


class Gauge(_Instrument):
    """A number that rises and falls: `combine` makes one of those of all processes, by default their sum.

    Of a process that ended, it is forgotten where `is_live`.
    """

    def set(self, value: float, *labels: str) -> None:
        """Set it."""
        self._open(labels)[0] = value

    def build_family(self, values: _Values) -> Metric:
        """Return its samples."""
        family = GaugeMetricFamily(self.name, self.documentation, labels=self.label_names)
        for labels, (value,) in values.items():
            family.add_metric(labels, value)
        return family


class Histogram(_Instrument):
    """How many observations are in each bucket, and the sum of all.

    Args:
        name: of the metric.
        documentation: one line on it.
        label_names: of the labels.
        buckets: upper bounds, rising; one of infinity is added.
    """

    def __init__(self, name: str, documentation: str, label_names: Sequence[str], buckets: Iterable[float]) -> None:
        super().__init__(name, documentation, label_names)
        self._bounds = (*buckets, float("inf"))
        self._names = [str(floatToGoString(bound)) for bound in self._bounds]  # type: ignore[no-untyped-call]
        self.width = len(self._bounds) + 1

    def observe(self, observed: Sequence[float], *labels: str) -> None:
        """Add observations, all of a bucket in one step."""
        cells = self._open(labels)
        for place, count in Tally([bisect_left(self._bounds, value) for value in observed]).items():
            cells[place] += count
        cells[-1] += sum(observed)

    def build_family(self, values: _Values) -> Metric:
        """Return its samples."""
        family = HistogramMetricFamily(self.name, self.documentation, labels=self.label_names)
        for labels, (*counts, total) in values.items():
            family.add_metric(labels, list(zip(self._names, accumulate(counts), strict=True)), total)
        return family


class _Collector(Collector):
    """Combines the numbers of all processes, for prometheus_client."""

    def collect(self, *some: str) -> Iterator[Metric]:
        """Return every metric, with no samples but those whose labels have some values, one after the other."""
        found: dict[str, dict[_Labels, list[memoryview[float]]]] = {name: {} for name in _instruments}
        part = orjson.dumps(some)[1:-1]
        for block in _memory.blocks:
            for key, cells in block.read():
                if part in key:
                    name, *labels = orjson.loads(key)
                    found[name].setdefault(tuple(labels), []).append(cells)
        for name, instrument in _instruments.items():
            values = {
                labels: [instrument.combine(each) for each in zip(*cells, strict=True)]
                for labels, cells in found[name].items()
            }
            if not instrument.label_names and not values:
                values = {(): [0.0] * instrument.width}
            yield instrument.build_family(values)


_instruments: dict[str, _Instrument] = {}
_memory = _Memory()
COLLECTOR = _Collector()
REGISTRY.register(COLLECTOR)


def share(count: int) -> None:
    """Map a block for each of `count` processes that will be forked; called by their parent, which has one, too."""
    _memory.blocks = [_memory.own, *(Block() for _ in range(count))]


def use(index: int) -> None:
    """Write to a block from now on; called by the process of that index, counted from 0, after the fork."""
    _memory.own = _memory.blocks[index + 1]
    _memory.own.take_over()


def forget_live(index: int) -> None:
    """Set the live gauges of a process that has ended to 0."""
    for key, cells in _memory.blocks[index + 1].read():
        if _instruments[orjson.loads(key)[0]].is_live:
            cells[0] = 0.0
