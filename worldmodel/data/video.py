"""MP4 files of small pictures, by PyAV: enlarged by a whole number so that their colours survive, safe against kills.

The file is a fragmented MP4, one fragment a second: after a kill all but the last second plays. Closing makes it a plain MP4
where the installed FFmpeg can (7.1 or newer).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from worldmodel.errors import DataError, DeviceError

TARGET_HEIGHT = 480
_BT709 = 1  # number of BT.709 in FFmpeg's enums for matrix, primaries and transfer


def default_scale(size: tuple[int, int]) -> int:
    """The whole factor that brings (H, W) nearest to 480 lines, at least 1."""
    return max(1, round(TARGET_HEIGHT / size[0]))


class VideoWriter:
    """Writes uint8 (H, W, 3) pictures of one size as H.264 (yuv420p, crf 16).

    size: (H, W) of the pictures. fps: pictures per second. scale: whole factor of enlargement. smooth: bicubic, else hard pixels.
    metadata: text tags of the file. Raises DeviceError if PyAV is absent, DataError if the file cannot be written or a picture
    does not fit.
    """

    def __init__(
        self,
        path: Path,
        size: tuple[int, int],
        fps: float,
        scale: int = 1,
        smooth: bool = True,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        try:
            import av
        except ImportError as error:
            raise DeviceError("writing MP4 needs PyAV, which is not installed: pip install av") from error
        if scale < 1 or fps <= 0 or min(size) < 1:
            raise DataError(f"a video needs a positive size, fps and scale, got {size}, {fps} and {scale}")
        self.path, self._size, self._av = Path(path), size, av
        # H.264 with 4:2:0 wants even sides
        height, width = (side * scale + (side * scale) % 2 for side in size)
        self._interpolation = "BICUBIC" if smooth else "POINT"
        rate = Fraction(fps).limit_denominator(1001)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._container: Any = av.open(str(self.path), "w", format="mp4", options=_container_options(av))
        except OSError as error:
            raise DataError(f"cannot write the video {path}: {error.strerror or error}") from error
        for key, value in (metadata or {}).items():
            self._container.metadata[key] = value
        self._stream = self._container.add_stream("libx264", rate=rate)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        # no B-frames and no look-ahead: a picture is in the file as soon as its fragment is full
        speed = {"preset": "veryfast", "bf": "0", "rc-lookahead": "0", "threads": "1"}
        self._stream.options = {"crf": "16", "g": str(max(1, round(fps))), **speed}
        context = self._stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = 1
        self.frames, self._failed = 0, False

    def write(self, rgb: np.ndarray) -> None:
        """Append one picture."""
        if self._container is None:
            raise DataError(f"the video {self.path} is closed")
        if rgb.dtype != np.uint8 or rgb.shape != (*self._size, 3):
            raise DataError(f"the video {self.path} takes uint8 {(*self._size, 3)}, got {rgb.dtype} {rgb.shape}")
        picture = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
        picture = picture.reformat(
            self._stream.width, self._stream.height, "yuv420p", dst_colorspace="ITU709", interpolation=self._interpolation
        )
        picture.pts = self.frames
        picture.time_base = 1 / self._stream.codec_context.framerate
        self.frames += 1
        self._mux(picture)

    def close(self) -> None:
        """Finish the file. Safe to call twice. A video without pictures leaves no file."""
        if self._container is None:
            return
        if self.frames and not self._failed:
            self._mux(None)
        container, self._container = self._container, None
        if self.frames and not self._failed:
            self._checked(container.close)
            return
        with contextlib.suppress(OSError):
            container.close()
        if not self.frames:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _mux(self, picture: Any) -> None:
        def write() -> None:
            for packet in self._stream.encode(picture):
                self._container.mux(packet)

        self._checked(write)

    def _checked(self, action: Any) -> None:
        try:
            action()
        except OSError as error:  # PyAV's errors of reading and writing are OSErrors
            self._failed = True  # nothing may be written any more: after a header that failed, FFmpeg would crash
            raise DataError(f"cannot write the video {self.path}: {error.strerror or error}") from error


def _container_options(av: Any) -> dict[str, str]:
    """Fragments while writing; a plain index on closing where FFmpeg knows how."""
    fragmented = "+frag_keyframe+empty_moov+default_base_moof"
    plain_at_close = av.library_versions["libavformat"] >= (61, 7, 0)
    return {"movflags": "+hybrid_fragmented" if plain_at_close else fragmented, "flush_packets": "1"}
