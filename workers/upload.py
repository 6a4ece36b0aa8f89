"""Brings tensors to a GPU in pinned memory and on a stream of their own, while the tensors before them are merged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Named = Mapping[str, Tensor]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Upload:
    """Tensors on their way to a device."""

    tensors: Sequence[dict[str, Tensor]]
    arrived: torch.cuda.Event | None

    def wait(self) -> Sequence[dict[str, Tensor]]:
        """The tensors; what is computed from now on sees them whole. Nothing waits but the device."""
        if self.arrived is not None:
            current = torch.cuda.current_stream()
            current.wait_event(self.arrived)
            for tensors in self.tensors:
                for tensor in tensors.values():
                    tensor.record_stream(current)  # else its memory could be given away while it is still read
        return self.tensors


class Uploader:
    """Copies tensors to ``device``. On the CPU they stay where they are.

    A copy from pageable memory stops the host until it is done, so tensors go through pinned memory, which torch keeps
    for the next ones.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def start(self, tensors: Sequence[Named]) -> Upload:
        """Begin to copy; the tensors must not change until the upload has been waited for."""
        if self._stream is None:
            return Upload([dict(named) for named in tensors], None)
        with torch.cuda.stream(self._stream):
            sent = [{name: self._sent(tensor) for name, tensor in named.items()} for named in tensors]
            arrived = self._stream.record_event()
        return Upload(sent, arrived)

    def ahead(
        self, items: Iterable[Item], tensors_of: Callable[[Item], Sequence[Named]]
    ) -> Iterator[tuple[Item, Sequence[dict[str, Tensor]]]]:
        """Every item with its tensors on the device; on a GPU the next item's are copied meanwhile.

        ``tensors_of`` waits until an item's tensors have been read. On the CPU nobody waits for an item early.
        """
        if self._stream is None:
            yield from ((item, self.start(tensors_of(item)).wait()) for item in items)
            return
        before: tuple[Item, Upload] | None = None
        for item in items:
            upload = self.start(tensors_of(item))
            if before is not None:
                yield before[0], before[1].wait()
            before = item, upload
        if before is not None:
            yield before[0], before[1].wait()

    def _sent(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self._device, non_blocking=True)
