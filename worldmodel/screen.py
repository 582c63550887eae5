"""The way of dreamed pictures to the host: the one place where pixels leave the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from worldmodel.runtime import Stopwatch


class Screen:
    """Decodes on a CUDA stream of its own, which goes before other work, so that the host waits for pictures and for nothing else.

    Elsewhere it decodes at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    @property
    def aside(self) -> bool:
        """Whether other work can run on the device while a picture is decoded."""
        return self._stream is not None

    def stream(self) -> AbstractContextManager[object]:
        """Where whatever touches a decoder's memory between two pictures belongs: memory is reused in the order of a stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def fetch(self, decode: Callable[[], Tensor], watch: Stopwatch) -> Callable[[], np.ndarray]:
        """Begin to decode, behind what the current stream was told; the result waits for the pictures and gives them to the host.

        What `decode` reads must not be freed or written before. Its time counts as the part ``decode`` of `watch`.
        """
        if self._stream is None:
            with watch.part("decode"):
                here = decode().cpu().numpy()
            return lambda: here
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), watch.part("decode"):
            pictures = decode()
            host = torch.empty(pictures.shape, dtype=pictures.dtype, pin_memory=True)
            host.copy_(pictures, non_blocking=True)
            done = torch.cuda.Event()
            done.record()

        def wait() -> np.ndarray:
            done.synchronize()
            return host.numpy()

        return wait
