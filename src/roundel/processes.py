"""The processes of one job, which torchrun has started: who takes which sequences, and sums that do not depend on how many there are.

    torchrun --nproc-per-node 8 -m roundel quantize ...

Problem: float sums depend on their order, and roundings to bfloat16 in between turn a last bit into a difference of 2^-9. So what is summed
over sequences is summed in `RUNS` runs of consecutive ones, however many processes there are (`runs`): run `j` belongs to process
`j mod n`, each is summed by itself, and the sums of runs are added in their order, in the first process (`summed`). The same in one
process. Up to `RUNS` processes therefore give the same bits; more have as many runs, and sums that differ by float rounding.

Everything else is either the same in all processes (text, the order of linears), or made by one of them and sent to the others as the bytes
of a safetensors file (`exchanged`, `from_first`): nothing is pickled.

Cost: for each sum of `m` bytes `RUNS` additions, and with `n` processes `RUNS (n - 1) / n` messages of `m` bytes and one to all; memory for
two of them.

A process that ends before the job does makes every other one's next message fail: `ProcessesError`, or the SIGTERM that torchrun sends. All
that is finished is in the job's directory by then. Of all the processes that stop, the first says why (`first_to_say`).
"""

from __future__ import annotations

import atexit
import datetime
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor, distributed
from torch.distributed.rendezvous import rendezvous

from roundel.errors import ProcessesError

__all__ = [
    "RUNS",
    "alone",
    "exchanged",
    "first",
    "first_to_say",
    "from_first",
    "in_turn",
    "join",
    "merged",
    "named",
    "on_this_machine",
    "own_rows",
    "rank",
    "runs",
    "sent",
    "shared_out",
    "summed",
    "together",
    "wait",
    "world",
]

T = TypeVar("T")
P = ParamSpec("P")

RUNS = 8
"""In how many runs sequences are summed."""

PATIENCE = datetime.timedelta(days=7)
"""How long one waits for another, that is alive: some steps are taken by one process, and those of a large model take hours."""


@dataclass
class _State:
    """Of this process."""

    alone: int = 0
    """How many contexts it is alone in."""
    store: Any = None
    """What all processes can reach."""


_state = _State()


def world() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if not _state.alone and distributed.is_available() and distributed.is_initialized() else 1


def on_this_machine() -> int:
    """How many of them share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world())) if world() > 1 else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return distributed.get_rank() if world() > 1 else 0


def first() -> bool:
    """Whether it is the one that writes."""
    return rank() == 0


def join() -> None:
    """Connects the processes that torchrun has started, once, until they end; nothing where there is one.

    Raises:
        ProcessesError: they do not find each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or distributed.is_initialized():
        return
    try:
        _state.store, own, count = next(iter(rendezvous("env://", timeout=PATIENCE)))
        device = None
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", own)) % torch.cuda.device_count())
            torch.cuda.set_device(device)
        backend = "gloo" if device is None else "cpu:gloo,cuda:nccl"
        distributed.init_process_group(backend, store=_state.store, rank=own, world_size=count, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise ProcessesError(f"the processes of this job do not find each other ({_line(error)}); start them with torchrun") from error
    atexit.register(distributed.destroy_process_group)  # gloo sometimes aborts a process that exits with its group open


def together(function: Callable[P, T]) -> Callable[P, T]:
    """A function that all processes of the job call, connected (`join`), and that ends when all have; the first shows its progress."""

    @wraps(function)
    def call(*args: P.args, **given: P.kwargs) -> T:
        join()
        if not first():
            given |= {"progress": None}  # type: ignore[assignment]
        found = function(*args, **given)
        wait()
        return found

    return call


def named(name: str) -> str:
    """A name for something of this process, in a directory that all have."""
    return name if first() else f"{name}-of-{rank()}"


def first_to_say() -> bool:
    """Whether this process is the first of all to ask: of many that stop together one should say why."""
    if _state.store is None:  # before they are connected all stop for the same reason
        return os.environ.get("RANK", "0") == "0"
    try:
        return int(_state.store.add("roundel/said", 1)) == 1
    except RuntimeError:  # the store has gone with its process, which has said it
        return False


@contextmanager
def alone() -> Iterator[None]:
    """Within the context this process is the only one: for what it does while others wait."""
    _state.alone += 1
    try:
        yield
    finally:
        _state.alone -= 1


@contextmanager
def in_turn() -> Iterator[None]:
    """The first process comes first, alone, and each of the others, alone too, when it is done: they find what it has left on the disk."""
    own = rank()
    if own > 0:
        wait()
    with alone():
        yield
    if own == 0:
        wait()


def wait() -> None:
    """Until all have come here."""
    merged(torch.zeros(1))


def runs(rows: Sequence[int], together: int = 1) -> list[Sequence[int]]:
    """Sequences in the runs in which they are summed.

    Two at least where there are more runs than one: whoever looks at a single sequence may mistake it for all text. `together`: as many
    consecutive ones are in one run.
    """
    least = max(2, together)
    count = max(1, min(max(RUNS, world()), len(rows) // least))
    size = -(-len(rows) // together)
    edges = [min(len(rows), size * place // count * together) for place in range(count + 1)]
    return [rows[start:stop] for start, stop in itertools.pairwise(edges)]


def own_rows(rows: Sequence[int], together: int = 1) -> list[int]:
    """Those of this process's runs."""
    return [row for run in runs(rows, together)[rank() :: world()] for row in run]


def summed(total: list[Tensor], count: int, part: Callable[[int], list[Tensor]]) -> list[Tensor]:
    """Sums of tensors over runs, in all processes, the same for any number of them.

    Args:
        total: What they are added to, the same in all; changed in place.
        count: How many runs.
        part: The sums of one run; asked for this process's, one after the other.
    """
    size, own = world(), rank()
    for start in range(0, count, size):
        mine = part(start + own) if start + own < count else None
        for place in range(min(size, count - start)):
            if own == 0:
                _add(total, mine if place == 0 else None, place)
            elif own == place:
                assert mine is not None
                with _talking():
                    for tensor in mine:
                        distributed.send(tensor.contiguous(), 0)
        del mine
    for tensor in total:
        sent(tensor, 0)
    return total


def _add(total: list[Tensor], mine: list[Tensor] | None, sender: int) -> None:
    for place, tensor in enumerate(total):
        if mine is not None:
            tensor.add_(mine[place])
            continue
        received = torch.empty_like(tensor)
        with _talking():
            distributed.recv(received, sender)
        tensor.add_(received)


def sent(tensor: Tensor, sender: int) -> Tensor:
    """What one process has in a tensor, in its place in all."""
    if world() > 1:
        with _talking():
            distributed.broadcast(tensor, sender)
    return tensor


def merged(values: Tensor) -> Tensor:
    """A tensor of which each process has filled a part and left zeros in the others', in place; for few numbers."""
    if world() > 1:
        with _talking():
            distributed.all_reduce(values)
    return values


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, alone, in all of them: a value that JSON holds."""
    if world() == 1:
        return make()
    content = b""
    if first():
        with alone():
            content = json.dumps(make()).encode()
    found: T = json.loads(_sent(content, 0))
    return found


def exchanged(tensors: Mapping[str, Tensor], notes: Mapping[str, Any] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, in main memory, and notes that JSON holds of all processes, by names of which no two have the same."""
    if world() == 1:
        return dict(tensors), dict(notes or {})
    content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, {"notes": json.dumps(dict(notes or {}))})
    found: dict[str, Tensor] = {}
    known: dict[str, Any] = {}
    for sender in range(world()):
        received = _sent(content if sender == rank() else b"", sender)
        found |= load(received)
        known |= json.loads(_metadata(received)["notes"])
    return found, known


def _metadata(content: bytes) -> dict[str, str]:
    """Of the bytes of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    found: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return found


def _sent(content: bytes, sender: int) -> bytes:
    """What one process has, in all."""
    size = sent(torch.tensor([len(content)]), sender)
    data = torch.empty(int(size), dtype=torch.uint8)
    if rank() == sender:
        data.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    return sent(data, sender).numpy().tobytes()


def shared_out(sizes: Mapping[str, float]) -> list[str]:
    """Which of these, by name, this process takes: the largest first, each to whoever has least."""
    loads = [0.0] * world()
    mine = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        loads[least] += sizes[name]
        if least == rank():
            mine.append(name)
    return [name for name in sizes if name in mine]


@contextmanager
def _talking() -> Iterator[None]:
    """Turns what goes wrong between processes into one error."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessesError(
            f"another process of this job has ended ({_line(error)}): its own message, or torchrun's, says why; with --work the same "
            "command goes on from what is finished, with any number of processes"
        ) from error


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
