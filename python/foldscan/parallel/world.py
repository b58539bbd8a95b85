"""The processes of a run: who they are, what one of them does for all, and how they end."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from foldscan.models.files import FormatError
from foldscan.parallel.collectives import PeerError, verdict
from foldscan.parallel.process_groups import forget

LAST_WORDS = 3.0  # seconds

_T = TypeVar("_T")
_Said = tuple[type[BaseException], str]


class World:
    """This process among those of a run; of one when torchrun did not start it.

    Attributes:
        rank, size: which, of how many. is_main: the one that writes files and talks to people.
        restarts: how often torchrun started the processes again after one had failed.
        common: the error that every process raises, if there is one; the main process tells of it.
    """

    def __init__(self, rank: int, size: int, restarts: int = 0) -> None:
        self.rank, self.size, self.restarts = rank, size, restarts
        self.common: BaseException | None = None
        self._over = threading.Event()
        self._watcher: threading.Thread | None = None
        self._handler: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def name(self) -> str:
        """For messages: which process this is; empty where there is one."""
        return f"rank {self.rank} of {self.size}: " if self.size > 1 else ""

    @classmethod
    def join(cls, timeout: float) -> World:
        """The world that torchrun's environment describes, connected by gloo.

        Args:
            timeout: seconds after which a collective that some rank does not join fails.

        Raises:
            RuntimeError: the others did not come.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls(0, 1)
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        if not dist.is_initialized():
            # Its functions have the world as a default argument: imported later (checkpoints do), they would own the
            # group for ever, and `close` could not end it.
            import torch.distributed.nn.functional  # noqa: F401

            limit = timedelta(seconds=timeout)
            store, rank, size = next(dist.rendezvous("env://", timeout=limit))
            # torchrun's store outlives a restart: without a name of its own, the new processes would look for the dead
            # ones, whose addresses are still in it.
            store = dist.PrefixStore(f"foldscan/{restarts}", store)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
        world = cls(dist.get_rank(), dist.get_world_size(), restarts)
        world._watch()
        return world

    def _watch(self) -> None:
        """Give this process a moment between torchrun's SIGTERM and its end.

        torchrun ends all processes as soon as one has failed, often before the others have noticed, who know what they
        were waiting for. A thread counts the time, since the main one may be inside of a collective.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        read, write = os.pipe()
        os.set_blocking(write, False)
        self._handler = signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)

        def wait() -> None:
            while not self._over.is_set():
                ready, _, _ = select.select([read], [], [], 0.2)
                if ready and signal.SIGTERM in os.read(read, 64):
                    time.sleep(LAST_WORDS)
                    os._exit(128 + signal.SIGTERM)
            os.close(read)

        self._watcher = threading.Thread(target=wait, daemon=True)
        self._watcher.start()

    def together(self, work: Callable[[], None]) -> None:
        """Let the main process do something while the others wait.

        Raises:
            OSError, ValueError, RuntimeError: on every process, what failed on the main one.
        """
        problem: BaseException | None = None
        if self.is_main:
            try:
                work()
            except (OSError, ValueError, RuntimeError) as error:
                problem = error
        if self.size > 1:
            problem = self.told((type(problem), str(problem)) if problem else None, _as_error)
        if problem is not None:
            raise self.shared(problem)

    def everyone(self, work: Callable[[], _T]) -> _T:
        """Do something that every process has to succeed in.

        Raises:
            OSError, ValueError: on every process, what failed on the first that failed.
        """
        if self.size == 1:
            return work()
        said: _Said | None = None
        results: list[_T] = []
        try:
            results.append(work())
        except (OSError, ValueError) as error:
            said = type(error), str(error)
        found: list[_Said | None] = [None] * self.size
        with waiting("what every rank makes ready"):
            dist.all_gather_object(found, said)
        failed = [(rank, told) for rank, told in enumerate(found) if told is not None]
        if failed:
            rank, (kind, text) = failed[0]
            alike = len(failed) == self.size and len({told for _, told in failed}) == 1
            problem = _as_error((kind, text if alike else f"rank {rank} of {self.size}: {text}"))
            assert problem is not None
            raise self.shared(problem)
        return results[0]

    def told(self, value: Any, read: Callable[[Any], _T]) -> _T:
        """What the main process says, on every process."""
        if self.size == 1:
            return read(value)
        box = [value if self.is_main else None]
        with waiting("word from rank 0"):
            dist.broadcast_object_list(box, src=0)
        return read(box[0])

    def shared(self, error: BaseException) -> BaseException:
        """An error that every process is about to raise, to be told by one."""
        self.common = error
        return error

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Say which process failed, and in what, before an error that it alone has."""
        try:
            yield
        except (RuntimeError, OSError, ValueError) as error:
            if error is self.common:
                raise
            if isinstance(error, RuntimeError):
                raise RuntimeError(f"{self.name()}{what}: {explain(error)}") from error
            if self.size == 1:
                raise
            raise _as_error((type(error), f"{self.name()}{what}: {error}")) or error from error

    def fail(self, error: BaseException) -> None:
        """Before an error leaves this process: see that it is told, once.

        Raises:
            SystemExit: every process has this error, and it is the main one's to tell.
        """
        if self.size == 1:
            return
        self._watcher = None  # it goes on until the process has ended: the error is still to be told
        if error is self.common:
            with contextlib.suppress(RuntimeError):
                dist.barrier()
            if not self.is_main:
                raise SystemExit(1)

    def close(self) -> None:
        """Leave; the processes of a run that ended well leave together."""
        if self._watcher is not None:
            self._over.set()
            self._watcher.join()
            os.close(signal.set_wakeup_fd(-1))
            signal.signal(signal.SIGTERM, self._handler)
        if self.size > 1 and dist.is_initialized():
            # A group's threads end with its last owner. Left to the interpreter's own end, they now and then abort the
            # process; models and schedules, which own groups, are in cycles.
            forget()
            gc.collect()
            dist.destroy_process_group()


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say what was waited for when a collective over all ranks fails."""
    try:
        yield
    except RuntimeError as error:
        raise PeerError(f"waiting for {what}, another rank {verdict(str(error))} ({error})") from error


def explain(error: BaseException) -> str:
    """What an error came from, past those who only say where they were when it reached them."""
    while error.__cause__ is not None and not isinstance(error, PeerError):
        error = error.__cause__
    text = str(error)
    return f"a neighbouring pipeline stage {verdict(text)} ({text})" if "gloo" in text[:40] else text


def _as_error(said: _Said | None) -> BaseException | None:
    if said is None:
        return None
    kind, text = said
    for known in (FormatError, FileExistsError, ValueError, OSError):
        if issubclass(kind, known):
            return known(text)
    return RuntimeError(text)
