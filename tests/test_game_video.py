"""MP4 files: readable, right colours, odd sizes, clear errors."""

import numpy as np
import pytest

from worldmodel.data.video import VideoWriter, default_scale
from worldmodel.errors import DataError

av = pytest.importorskip("av")


def read(path):
    with av.open(str(path)) as container:
        return [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]


@pytest.mark.parametrize(("size", "scale"), [((80, 128), 6), ((45, 33), 3), ((7, 9), 1)])
def test_pictures_come_back_with_their_colours(tmp_path, size, scale):
    rng = np.random.default_rng(0)
    blocks = rng.integers(20, 235, (-(-size[0] // 16), -(-size[1] // 16), 3), dtype=np.uint8)
    picture = np.kron(blocks, np.ones((16, 16, 1), np.uint8))[: size[0], : size[1]]
    with VideoWriter(tmp_path / "a.mp4", size, 17.5, scale) as video:
        for _ in range(10):
            video.write(picture)
    frames = read(tmp_path / "a.mp4")
    assert len(frames) == 10
    height, width = frames[0].shape[:2]
    assert height % 2 == 0 and width % 2 == 0 and 0 <= height - size[0] * scale <= 1
    large = picture.repeat(scale, 0).repeat(scale, 1).astype(int)
    middle = np.abs(frames[5][: large.shape[0], : large.shape[1]].astype(int) - large)
    assert np.median(middle) < 4


def test_nearest_enlargement_keeps_pixels_apart(tmp_path):
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:, ::2] = 255
    for smooth in (True, False):
        with VideoWriter(tmp_path / f"{smooth}.mp4", (16, 16), 10, 8, smooth=smooth) as video:
            video.write(picture)
    hard, soft = (read(tmp_path / f"{s}.mp4")[0].astype(int) for s in (False, True))
    grey = [np.mean((x > 60) & (x < 195)) for x in (hard, soft)]
    assert grey[0] < 0.05 < grey[1]


def test_wrong_pictures_and_places_are_named(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", (8, 8), 10) as video, pytest.raises(DataError, match="takes uint8"):
        video.write(np.zeros((8, 9, 3), np.uint8))
    assert not (tmp_path / "a.mp4").exists()  # a video without pictures leaves no file
    with pytest.raises(DataError, match="is closed"):
        video.write(np.zeros((8, 8, 3), np.uint8))
    video.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the video"):
        VideoWriter(tmp_path / "file" / "a.mp4", (8, 8), 10)
    with pytest.raises(DataError, match="positive"):
        VideoWriter(tmp_path / "a.mp4", (8, 8), 10, 0)


def test_default_scale_brings_small_pictures_to_television_size():
    assert [default_scale(s) for s in ((80, 128), (480, 832), (1080, 1920), (96, 96))] == [6, 1, 1, 5]
