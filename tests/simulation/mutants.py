"""Bugs put in on purpose, as edits of one function each. The simulation must find every one."""

import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from service.hosts.supervisor import Supervisor
from service.model import batching, channel, remote
from service.model.batching import Batcher
from service.model.engine import Engine
from service.model.openings import Openings
from service.model.remote import EngineClient
from service.registry.coordination import Coordination, GroupMember
from service.registry.loading import Change, Loader
from service.registry.reconciler import Reconciler
from service.registry.record import Record


class Mutant(NamedTuple):
    """One bug: in a function of a class or module, some text is replaced by another."""

    scenario: str
    title: str
    owner: object
    function: str
    old: str
    new: str

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Have the bug in the product.

        Raises:
            ValueError: the function has no such text, or more than once: the mutant needs to follow the product.
        """
        original = inspect.getattr_static(self.owner, self.function)
        function: Callable[..., Any] = getattr(original, "__wrapped__", getattr(original, "fget", original))
        source = textwrap.dedent(inspect.getsource(function))
        if source.count(self.old) != 1:
            raise ValueError(f"{self.function} has {source.count(self.old)} times {self.old!r}, not once")
        names: dict[str, Any] = {}
        exec(source.replace(self.old, self.new), function.__globals__, names)
        setattr(self.owner, self.function, names[self.function])
        try:
            yield
        finally:
            setattr(self.owner, self.function, original)


_BATCHER = (
    (
        "rows of those gone away stay counted",
        Batcher,
        "_take",
        "self._rows -= entry.rows\n        elif",
        "pass\n        elif",
    ),
    ("rows of the expired stay counted", Batcher, "_sweep", "self._rows -= sum(", "sum("),
    ("the loop's queue is flushed once", Batcher, "_flush", "self._flushing = False", "pass"),
    ("the thread stops after a call", Batcher, "_finish_thread", "self._start_thread()", "pass"),
    ("a bad request fails its batch", batching, "_run", "if len(batch) > 1:", "if False:"),
    ("a batch's outputs are mixed up", batching, "_run", "start += entry.rows", "start += 1"),
    ("a full queue takes more", Batcher, "submit", "self._rows + count > self", "self._rows > self"),
    ("what waited for the loop is forgotten", Batcher, "_leave_to_thread", "self._threaded += self._inline", "pass"),
    ("a panic leaves a batch unanswered", batching, "_run", "except BaseException", "except Exception"),
    ("one broken caller stops the others", batching, "give_answer", "except Exception", "except ValueError"),
    ("the queue is swept once", Batcher, "_sweep", "if self._sweeping:", "if False:"),
    ("deadlines are not looked at", Batcher, "_sweep", "entry.deadline < now", "False"),
    ("a call takes too many rows", Batcher, "_take", "rows + queue[0].rows > limit", "rows > limit"),
    ("late requests are accepted", Batcher, "_check_wait", "late > 0", "late > 1e9"),
    ("a request expires twice", Batcher, "_sweep", "and not entry.waiter.answered", ""),
)
_ENGINE = (
    (
        "what an engine had is not answered",
        EngineClient,
        "_run_connected",
        "waiter, _ in pending.values()",
        "waiter, _ in ()",
    ),
    ("nothing is opened again", EngineClient, "_reopen", "0.0 if batcher.problem else", ""),
    ("a version opened twice is closed at once", EngineClient, "open", "next(self._numbers)", "0"),
    ("one holder's end is that of all", Engine, "_release", "holder not in (None, each[1])", "False"),
    ("a worker that dies holds on", Engine, "_serve", "self._release(worker)", "pass"),
    ("a version kills again and again", Openings, "opening", "self._note.write_text(key)", "pass"),
    ("a message in pieces is read in part", channel, "_receive", "while count:", "if count:"),
    ("one broken caller cuts off the others", remote, "give_answer", "except Exception", "except ValueError"),
)
_RECONCILER = (
    ("workers do not wait for each other", Reconciler, "_follow", "is_prepared(state.generation)", "is_prepared(0)"),
    ("what failed elsewhere is served", Reconciler, "_commit", "self._coordination.read_failures()", "NO_FAILURES"),
    ("what failed elsewhere is never tried again", Change, "exclude", "not in refused | pending", "not in pending"),
    ("old failures are not told", Loader, "prepare", "(refused | complete).items()", "complete.items()"),
    ("an unreadable folder counts as read", Reconciler, "_prepare", ", _FOLDER: str(error)", ""),
    ("a value is replaced in place", Record, "_place", "number % 2", "0"),
    ("the dead are waited for", GroupMember, "read_statuses", '_is_alive(fields.pop("pid"))', 'fields.pop("pid")'),
    ("nobody takes over from a dead leader", GroupMember, "is_leader", "or not _is_alive(leader[0])", ""),
    ("different folders count as settled", Coordination, "is_settled", "len(digests) <= 1", "True"),
)
_SUPERVISOR = (
    ("an engine that is done starts again", Supervisor, "_handle_death", "math.inf if is_done else", ""),
    ("a worker that hangs lives on", Supervisor, "_check_heartbeats", "worker.silent >= limit", "False"),
    ("a worker that works is killed", Supervisor, "_check_heartbeats", "and count == worker.heartbeats", ""),
    ("a worker that cannot start is tried at once", Supervisor, "_handle_death", "if worker.failures else 0.0", "* 0"),
    ("one bad worker ends the service", Supervisor, "_handle_death", "any(other.ready for other in others)", "False"),
    ("a second signal is ignored", Supervisor, "_wait_for_end", "self._signals < 2", "self._signals < 9"),
    ("a copy of a signal kills", Supervisor, "run", "now - self._signalled_at < ECHO_SECONDS", "False"),
    ("nobody is told how the one before ended", Supervisor, "_handle_death", "process.exitcode or 0", "0"),
    ("a request for an engine is lost", Supervisor, "_read", "self.request(message)", "pass"),
)
MUTANTS = [
    Mutant(scenario, *row)
    for scenario, rows in (
        ("batcher", _BATCHER),
        ("engine", _ENGINE),
        ("reconciler", _RECONCILER),
        ("supervisor", _SUPERVISOR),
    )
    for row in rows
]
