"""Collective calls among the workers of a run. A single worker needs no process group."""

from collections.abc import Callable
from typing import Any, TypeVar

from graftwork.errors import GraftworkError

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """This process' number and how many there are; (0, 1) without a process group."""
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def all_gather_object(value: T, group: Any = None) -> list[T]:
    """The value of every rank, in order. Collective."""
    import torch.distributed as dist

    rank, world = rank_and_world()
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value, group=group)
    return values


def attempt(ask: Callable[[], T]) -> T | GraftworkError:
    """The answer, or the error meant for people: a value that can be sent to the other ranks."""
    try:
        return ask()
    except GraftworkError as error:
        return error


def from_rank_0(ask: Callable[[], T]) -> T:
    """What rank 0 is answered, on every rank; an error of rank 0 is raised on every rank. Collective."""
    import torch.distributed as dist

    rank, world = rank_and_world()
    found: list[Any] = [attempt(ask) if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(found, src=0)
    answer: T | GraftworkError = found[0]
    if isinstance(answer, GraftworkError):
        raise answer
    return answer
