"""The processes of a run: who they are, what one of them does for all, and how they end."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from foldscan.parallel.collectives import PeerError, verdict

_T = TypeVar("_T")


class World:
    """This process among those of a run; of one when torchrun did not start it.

    Attributes:
        rank, size: which, of how many. is_main: the one that writes files and talks to people.
        restarts: how often torchrun started the processes again after one had failed.
    """

    def __init__(self, rank: int, size: int, restarts: int = 0) -> None:
        self.rank, self.size, self.restarts = rank, size, restarts

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
            limit = timedelta(seconds=timeout)
            store, rank, size = next(dist.rendezvous("env://", timeout=limit))
            # torchrun's store outlives a restart: without a name of its own, the new processes would look for the dead
            # ones, whose addresses are still in it.
            store = dist.PrefixStore(f"foldscan/{restarts}", store)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
        return cls(dist.get_rank(), dist.get_world_size(), restarts)

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
            raise problem

    def told(self, value: Any, read: Callable[[Any], _T]) -> _T:
        """What the main process says, on every process."""
        if self.size == 1:
            return read(value)
        box = [value if self.is_main else None]
        dist.broadcast_object_list(box, src=0)
        return read(box[0])

    def close(self) -> None:
        """Leave; the processes of a run that ended well leave together."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def explain(error: BaseException) -> str:
    """What an error came from, past those who only say where they were when it reached them."""
    while error.__cause__ is not None and not isinstance(error, PeerError):
        error = error.__cause__
    text = str(error)
    return f"a neighbouring pipeline stage {verdict(text)} ({text})" if "gloo" in text[:40] else text


def _as_error(said: tuple[type[BaseException], str] | None) -> BaseException | None:
    if said is None:
        return None
    kind, text = said
    for known in (ValueError, OSError):
        if issubclass(kind, known):
            return known(text)
    return RuntimeError(text)
