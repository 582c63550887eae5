"""``python -m train.prepare VIDEOS OUT --vae ... --text-encoder ... --tokenizer ...``: encode videos and prompts once.

What VIDEOS may hold is told in `train.clips`, what OUT then holds in `train.videos`. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from train.clips import PER_LATENT, Clip, Video, cut, find_videos, picture_size
from train.record import read_json
from worldmodel.data.episode import write_atomic
from worldmodel.data.progress import Progress
from worldmodel.errors import DataError, WorldModelError
from worldmodel.flags import FlagParser, rate, whole

if TYPE_CHECKING:
    from torch import Tensor

# The family's own: what guidance leads away from, in training and in sampling of these networks.
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"  # noqa: RUF001
    "JPEG压缩残留，丑陋的，残缺的，"  # noqa: RUF001
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"  # noqa: RUF001
    "杂乱的背景，三条腿，"  # noqa: RUF001
    "背景人很多，倒着走"  # noqa: RUF001
)
PIECE = 8  # pictures that the encoder is given at a time

Encode = Callable[["Clip"], "Tensor"]
Embed = Callable[[Sequence[str]], "list[Tensor]"]
Encoded = tuple[Clip, "Tensor"]  # the pictures of a clip are let go: those of a whole shard would be gigabytes


@dataclass(frozen=True)
class Plan:
    """What the content of a prepared folder depends on. frames: pictures of a clip, 1 + 4 n. shard: clips of a file.

    codec, text: ids of video codec and text encoder.
    """

    height: int
    width: int
    fps: float
    frames: int
    shard: int
    negative: str
    codec: str
    text: str

    def digest(self, videos: Sequence[Video]) -> str:
        """Names this plan for these videos."""
        told = [(video.told, video.path.stat().st_size) for video in videos]
        return hashlib.sha256(json.dumps([asdict(self), told], sort_keys=True).encode()).hexdigest()[:16]


def prepare(
    folder: Path,
    out: Path,
    plan: Plan,
    encode: Encode,
    embed: Embed,
    report: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> int:
    """Encode what `out` lacks of the videos in `folder`; returns the number of clips there.

    encode: a clip -> latents (L,C,h,w). embed: texts -> (L,D) each. Videos that cannot be read are named to `report` and left out.
    Raises WorldModelErrors: another plan in `out`, no usable video, a full disk.
    """
    from train.videos import INDEX, NEGATIVE, PLAN, read_shard
    from worldmodel.tensor_files import Facts, write_tensors

    videos = find_videos(folder)
    out.mkdir(parents=True, exist_ok=True)
    digest = plan.digest(videos)
    begun = read_json(out / PLAN)
    if begun is not None and begun.get("digest") != digest:
        raise DataError(f"{out} was begun with other videos or settings: delete it, or name another folder")
    write_atomic(out / PLAN, json.dumps({"digest": digest, **asdict(plan)}, ensure_ascii=False).encode())
    if not (out / NEGATIVE).is_file():
        (negative,) = (row.cpu().contiguous() for row in embed([plan.negative]))
        facts = {"embedding": Facts(negative.dtype, tuple(negative.shape))}
        write_tensors(out / NEGATIVE, facts, iter([("embedding", negative)]), {"text": plan.negative})
    done = [read_shard(path)[1] for path in sorted(out.glob("shard-*.safetensors"))]
    start, clips = done[-1]["next"] if done else [0, 0], sum(len(note["clips"]) for note in done)
    number = len(done)
    for group, following in _groups(videos, plan, start, encode, report, progress):
        tensors, note = _shard(group, embed)
        facts = {name: Facts(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        write_tensors(out / f"shard-{number:05d}.safetensors", facts, iter(tensors.items()), {**note, "next": following})
        number, clips = number + 1, clips + len(group)
    if not clips:
        raise DataError(f"no video of {folder} gives a clip of {plan.frames} pictures at {plan.fps:g} a second: lower --frames")
    index = {"shards": number, "codec": plan.codec, "text": plan.text, "clips": clips, "fps": plan.fps}
    write_atomic(out / INDEX, json.dumps(index).encode())
    return clips


def _groups(
    videos: Sequence[Video],
    plan: Plan,
    start: Sequence[int],
    encode: Encode,
    report: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> Iterator[tuple[list[Encoded], list[int]]]:
    """Clips of one shard, and where the next begins: (video, clip in it)."""
    group: list[Encoded] = []
    for place in range(start[0], len(videos)):
        progress(place, len(videos))
        skipped = start[1] if place == start[0] else 0
        try:
            found = 0
            for clip in itertools.islice(cut(videos[place], (plan.height, plan.width), plan.fps, plan.frames), skipped, None):
                found += 1
                group.append((replace(clip, pictures=np.empty(0, np.uint8)), encode(clip).half().cpu()))
                if len(group) == plan.shard:
                    yield group, [place, clip.number + 1]
                    group = []
            if not found + skipped:
                report(f"skipped {videos[place].path}: it is shorter than {plan.frames} pictures at {plan.fps:g} a second")
        except DataError as error:
            report(f"skipped {error}")
    progress(len(videos), len(videos))
    if group:
        yield group, [len(videos), 0]


def _shard(group: Sequence[Encoded], embed: Embed) -> tuple[Mapping[str, Tensor], dict[str, object]]:
    import torch

    clips, latents = zip(*group, strict=True)
    texts = list(dict.fromkeys(clip.video.prompt for clip in clips))
    known = {text: rows.cpu() for text, rows in zip(texts, embed(texts), strict=True)}
    rows = [known[clip.video.prompt] for clip in clips]
    tensors = {"latents": torch.cat(latents).contiguous(), "text": torch.cat(rows).contiguous()}
    if clips[0].views is not None:
        tensors["views"] = torch.cat([torch.from_numpy(clip.views) for clip in clips])
        tensors["intrinsics"] = torch.cat([torch.from_numpy(clip.intrinsics) for clip in clips])
    table = [
        {
            "file": clip.video.told["file"],
            "number": clip.number,
            "prompt": clip.video.prompt,
            "latents": len(latent),
            "tokens": len(row),
        }
        for clip, latent, row in zip(clips, latents, rows, strict=True)
    ]
    return tensors, {"clips": table}


def video_encoder(path: Path, device: str) -> tuple[Encode, str]:
    """The published video codec as a function of clips, and its id. Raises CheckpointError."""
    import torch

    from train.video_codec import load_encoder
    from worldmodel.models.codec import to_float
    from worldmodel.models.video import VideoEncoder
    from worldmodel.runtime import pick_device

    place = pick_device(device)[0]
    net, name = load_encoder(path, place)
    stream = VideoEncoder(net)

    def encode(clip: Clip) -> Tensor:
        stream.reset()
        parts = (torch.from_numpy(clip.pictures[at : at + PIECE]) for at in range(0, len(clip.pictures), PIECE))
        return torch.cat([stream.encode(to_float(part.to(place))[None])[0] for part in parts])

    return encode, name


def text_encoder(weights: Path, tokenizer: Path, device: str) -> tuple[Embed, str]:
    """The published text encoder as a function of texts, and its id. On a GPU it stays there. Raises WorldModelErrors."""
    from worldmodel.models.wan.prompts import PromptEncoder, need_packages
    from worldmodel.runtime import pick_device

    need_packages()
    place = pick_device(device)[0]
    prompts = PromptEncoder(weights, tokenizer, place, keep=place.type == "cuda")
    return prompts, prompts.id


def parser() -> argparse.ArgumentParser:
    """All flags."""
    p = FlagParser(prog="python -m train.prepare", description="Encode videos and prompts once, for training. Again: it goes on.")
    p.add_argument("videos", type=Path, metavar="VIDEOS", help="a folder of videos, with clips.jsonl or captions NAME.txt")
    p.add_argument("out", type=Path, metavar="OUT", help="the folder to write, for data.root=")
    p.add_argument("--vae", type=Path, required=True, metavar="FILE", help="Wan2.1_VAE.pth")
    p.add_argument("--text-encoder", type=Path, required=True, metavar="FILE", help="models_t5_umt5-xxl-enc-bf16.pth")
    p.add_argument("--tokenizer", type=Path, required=True, metavar="FILE", help="spiece.model of google/umt5-xxl")
    p.add_argument("--size", default="832x480", metavar="WxH", help="of the pictures (default: 832x480)")
    p.add_argument("--fps", type=rate, default=16.0, metavar="N", help="pictures a second (default: 16)")
    p.add_argument("--frames", type=whole(5, 4097), default=81, metavar="N", help="pictures of a clip, 1 + 4 n (default: 81)")
    p.add_argument("--shard", type=whole(1), default=64, metavar="N", help="clips of a file (default: 64)")
    p.add_argument("--negative", default=NEGATIVE, metavar="TEXT", help="what guidance leads away from (default: the family's own)")
    p.add_argument("--device", default="auto", help="cpu, cuda, mps or auto (default)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error (one sentence on stderr), 130 interrupted."""
    flags = parser().parse_args(argv)
    try:
        size = picture_size(flags.size)
        if flags.frames % PER_LATENT != 1:
            raise DataError(f"--frames is 1 + 4 n, as the video codec wants it (81, 77, 33), got {flags.frames}")
        find_videos(flags.videos)  # what can be wrong at a glance is told before the slow part
        encode, codec = video_encoder(flags.vae, flags.device)
        embed, text = text_encoder(flags.text_encoder, flags.tokenizer, flags.device)
        plan = Plan(*size, flags.fps, flags.frames, flags.shard, flags.negative, codec, text)
        with Progress("preparing", "videos") as progress:
            clips = prepare(flags.videos, flags.out, plan, encode, embed, _say, progress.update)
    except KeyboardInterrupt:
        print("stopped; finished files are kept, the same command goes on", file=sys.stderr)
        return 130
    except WorldModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot read or write ({error}): free some space or choose another place, and run again", file=sys.stderr)
        return 2
    latents = 1 + (flags.frames - 1) // PER_LATENT
    print(
        f"{flags.out}: {clips} clips of {latents} latents; train with data=video data.root={flags.out} stage.clip_frames={latents}"
    )
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
