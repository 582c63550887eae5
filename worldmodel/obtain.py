"""A published world by name, ready to play: announced, agreed to, fetched, converted once, kept as a world folder.

Beside fetched worlds (see `worldmodel.hub`): ``files/DIGEST/NAME`` is a published file, whole and verified, ``published/NAME/ID``
the world made of them. The converted transformer's file is let go; the others serve further worlds and prompts. Torch is imported
only when something has to be made.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from worldmodel.amounts import megabytes
from worldmodel.consent import announce, ask
from worldmodel.errors import CheckpointError, ConfigError, HubError
from worldmodel.hub import NOT_STATED, Listing, check_access, home, listing
from worldmodel.hub_errors import explained
from worldmodel.hub_transfer import SPARE, Meter, RemoteFile, fetch_file, free_space, partial, tuned_client
from worldmodel.prompt_list import check_number, entries, find
from worldmodel.published import Source, VideoCard, is_card, read_card

if TYPE_CHECKING:
    from worldmodel.prompt_book import PromptBook
    from worldmodel.video_world import Prompt

_AT_FAULT = "the file is as the hub has it: if that does not help, take another --revision, or tell its owner"
_MOVE_AWAY = "or move that file away: the same command fetches it anew then"
WORLD, TEXT = ("model", "decoder", "encoder"), ("text_encoder", "tokenizer")  # fields of the card


@dataclass(frozen=True)
class Wish:
    """What is asked for. world: a card's name or file, with ``@REVISION`` or without. revision: of the model's file.

    prompt: text or number, None: any. yes: nobody needs to be asked. device, window: as ``--device`` and ``--window``.
    image: it shall begin with a picture.
    """

    world: str
    revision: str | None = None
    offline: bool = False
    prompt: str | None = None
    yes: bool = False
    device: str = "auto"
    window: int | None = None
    image: bool = False


@dataclass(frozen=True)
class Part:
    """A file to fetch. field: of the card. target: where it is kept. gated: its repository's terms must have been accepted."""

    field: str
    source: Source
    commit: str
    licence: str
    file: RemoteFile
    target: Path
    gated: bool

    @property
    def left(self) -> int:
        """Bytes that are still to come."""
        arriving = partial(self.target)
        here = self.target if self.target.is_file() else arriving
        return self.file.size - (here.stat().st_size if here.is_file() else 0)


@dataclass(frozen=True)
class Order:
    """What is to be done. text: a prompt to encode, or None. make: the world itself is to be made, at `folder`."""

    name: str
    card: VideoCard
    folder: Path
    text: str | None
    make: bool
    parts: tuple[Part, ...]

    @property
    def room(self) -> int:
        """Bytes that the disk needs at the most: what is to come and, before the model's file is let go, the converted one."""
        converted = sum(part.file.size for part in self.parts if part.field in WORLD) if self.make else 0
        return sum(part.left for part in self.parts) + converted + SPARE

    def words(self) -> str:
        """Several lines for a person: files, sizes, licences, memory, target."""
        rows = [f"  {p.source.file:<40} {megabytes(p.file.size):>10}  {p.source.repo}, licence: {p.licence}" for p in self.parts]
        left, total = sum(p.left for p in self.parts), sum(p.file.size for p in self.parts)
        here = f", {megabytes(total - left)} of it are here already" if left < total else ""
        memory = f"; playing needs about {megabytes(self.card.memory_mb * 10**6)} of memory" if self.card.memory_mb else ""
        what = f"{self.name} ({self.card.title})" if self.make else f"{self.name}: the text encoder, for the prompt {self.text!r}"
        tail = f"{len(self.parts)} files, {megabytes(total)}{here}; into {home()} ({megabytes(free_space(home()))} free){memory}"
        return "\n".join([f"{what} needs these public files:", *rows, tail])

    def facts(self) -> dict[str, object]:
        """The same as plain JSON values."""
        files = [
            {"file": p.source.file, "repo": p.source.repo, "commit": p.commit, "bytes": p.file.size, "licence": p.licence}
            for p in self.parts
        ]
        left = sum(p.left for p in self.parts)
        return {"name": self.name, "files": files, "bytes_left": left, "disk": self.room, "memory_mb": self.card.memory_mb}


def obtain(wish: Wish) -> tuple[Path, str]:
    """(the world folder, the name that opens it again) of a published world, made first if it is not here.

    Raises WorldModelErrors.
    """
    from huggingface_hub.utils import WeakFileLock

    order, source = plan_of(wish)
    if not order.make and order.text is None:
        return order.folder, source
    if order.parts:
        _agree(order, wish)
    home().mkdir(parents=True, exist_ok=True)
    with WeakFileLock(home() / ".published.lock"):
        faster = order.make and _is_here(order.folder)  # somebody else was
        if not faster:
            _fetch(order)
            _make(order, wish.device)
    return obtain(replace(wish, yes=True)) if faster else (order.folder, source)


def forget(folder: Path) -> bool:
    """Remove a world made here that turned out to be damaged, so that the next start makes it again. False: it is none of ours."""
    ours = folder.parent.parent == home() / "published"
    if ours:
        shutil.rmtree(folder, ignore_errors=True)
    return ours


def is_published(world: str) -> bool:
    """Whether `world`, with ``@REVISION`` or without, is a published one's name or card, and not a folder's name."""
    return is_card(world.partition("@")[0]) and not (Path(world) / "config.json").is_file()


def plan_of(wish: Wish) -> tuple[Order, str]:
    """(what `obtain` would do, the name that opens the world again); asks the hub only where something is to be fetched."""
    name, _, suffix = wish.world.partition("@")
    if wish.revision and suffix and wish.revision != suffix:
        raise ConfigError(f"two revisions are asked for, {suffix!r} and --revision {wish.revision!r}: give one")
    card, revision = read_card(name), wish.revision or suffix
    if revision and revision != card.model.revision:  # what is known of the card's own revision does not hold for it
        card = replace(card, model=Source(card.model.repo, card.model.file, revision))
    if wish.image and card.chunk > 1:
        from worldmodel.video_world import check_chunk

        check_chunk(Path(name).stem, card.chunk)  # before anything is fetched
    folder = home() / "published" / Path(name).stem / card.id
    make, wanted = not _is_here(folder), (wish.prompt or "").strip()
    if make and (not wanted or wanted.isdecimal()):  # a number chooses among prompts, of which there is the card's then
        check_number(wanted, 1, Path(name).stem)
        wanted = card.prompt
    text = wanted if wanted and (make or find(folder, wanted) is None) else None
    if text is not None and not make:
        check_number(text, len(entries(folder)), Path(name).stem)
    encode = text is not None and (make or not _book(folder).knows(text))
    parts = _parts(card, (*(WORLD if make else ()), *(TEXT if encode else ())), wish.offline, name)
    return Order(Path(name).stem, card, folder, text, make, parts), name + (f"@{revision}" if revision else "")


def _is_here(folder: Path) -> bool:
    """Whether the world was made. Its hashes are checked when it is opened."""
    return (folder / "config.json").is_file()


def _book(folder: Path, device: str = "cpu") -> PromptBook:
    """Where prompts of a world come from that need nothing of the hub. device: of the text encoder."""
    from worldmodel.prompt_book import PromptBook

    return PromptBook({}, _encoder_id(folder), device)


def _encoder_id(folder: Path) -> str:
    return next((entry.encoder for entry in entries(folder)), "")


def _parts(card: VideoCard, fields: Sequence[str], offline: bool, name: str) -> tuple[Part, ...]:
    from huggingface_hub import constants

    if fields and (offline or constants.HF_HUB_OFFLINE):
        raise HubError(f"{name} is not on this machine as a whole: run once without --offline (or HF_HUB_OFFLINE) to fetch it")
    known: dict[tuple[str, str], Listing] = {}
    found = []
    for field in fields:
        source: Source = getattr(card, field)
        key = (source.repo, source.revision)
        if key not in known:
            with explained(*key):
                known[key] = listing(*key)
        found.append(_part(field, source, known[key]))
    return tuple(found)


def _part(field: str, source: Source, known: Listing) -> Part:
    file = known.files.get(source.file)
    if file is None:
        raise HubError(f"{source.repo} at {source.revision} has no file {source.file}: leave out --revision, or update worldmodel")
    if (source.sha256 and file.large and file.digest != source.sha256) or (source.size and file.size != source.size):
        raise HubError(
            f"{source.file} of {source.repo} is not the file that this version knows (another size or hash): update worldmodel"
        )
    target = home() / "files" / file.digest / Path(source.file).name
    return Part(field, source, known.commit, known.licence, file, target, known.gated)


def _agree(order: Order, wish: Wish) -> None:
    """Say what will be fetched and see that there is access, room and a yes. Raises HubError, DeviceError."""
    for repo in dict.fromkeys(part.source.repo for part in order.parts if part.gated and part.left):
        check_access(repo)
    announce(order.words(), order.name, home(), order.room)
    if order.make:
        _check_memory(order, wish)
    if any(part.field in TEXT for part in order.parts):
        from worldmodel.models.wan.prompts import need_packages

        need_packages()
    if not wish.yes and any(part.left for part in order.parts):
        ask("Fetch and convert this once?")


def _check_memory(order: Order, wish: Wish) -> None:
    """Raise DeviceError where the world will not fit; say where its parts will live. No file is needed for that."""
    from worldmodel import runtime
    from worldmodel.assemble import expected_world
    from worldmodel.video_world import placed_on, remembering

    config = remembering(expected_world(order.name, order.card), wish.window)
    text = next((part.file.size for part in order.parts if part.field == "text_encoder"), order.card.text_encoder.size)
    plan = placed_on(runtime.pick_device(wish.device)[0], config, text=(text, text // 24))  # the published one has 24 layers
    print("\n".join(["to play it:", *(f"  {line}" for line in plan.lines)]), flush=True)


def _fetch(order: Order) -> None:
    try:
        with tuned_client(), Meter(sum(p.file.size for p in order.parts)) as meter:
            for part in order.parts:
                with explained(part.source.repo, part.source.revision):
                    fetch_file(part.source.repo, part.commit, part.file, part.target, meter)
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        raise


def _make(order: Order, device: str) -> None:
    """Convert and encode what was fetched; the world gets its name when it is whole. Raises WorldModelErrors."""
    from worldmodel.assemble import add_prompts, assemble

    files = {part.field: part.target for part in order.parts}
    try:
        prompts = [_encoded(order, files, device)]
        if not order.make:
            add_prompts(order.folder, prompts)
            return
        print("converting, once", flush=True)
        origin = {part.field: f"{part.source.repo}@{part.commit}/{part.source.file}" for part in order.parts}
        licence = next(part.licence for part in order.parts if part.field == "model")
        if licence != NOT_STATED:
            origin["license"] = licence
        assemble(order.name, order.card, files["model"], files["decoder"], prompts, order.folder, files["encoder"], origin)
    except CheckpointError as error:
        raise CheckpointError(f"{order.name} could not be made: {error}; {_AT_FAULT if files else _MOVE_AWAY}") from error
    shutil.rmtree(files["model"].parent, ignore_errors=True)


def _encoded(order: Order, files: Mapping[str, Path], device: str) -> Prompt:
    """The prompt that is asked for. No network is loaded yet: its text encoder may have what is free on `device`."""
    from worldmodel.assemble import embedded
    from worldmodel.models.wan.text import layer_bytes
    from worldmodel.placement import spoken
    from worldmodel.prompt_book import encoder_sizes
    from worldmodel.video_world import Prompt, text_device

    text, fetched = order.text or "", "tokenizer" in files
    layer = layer_bytes(files["text_encoder"]) if fetched else encoder_sizes(_encoder_id(order.folder))[1]
    place = text_device(device, layer)
    print(f"encoding the prompt {text!r} on {spoken(place)}", flush=True)
    if fetched:
        return embedded([text], files["text_encoder"], files["tokenizer"], place)[0]
    book = _book(order.folder, place)
    return Prompt(text, book(text), book.encoder)
