"""Worlds that live on the Hugging Face Hub: found by name, announced, fetched once, kept. No torch.

Kept in the assets folder of the hub's cache (HF_HOME, HF_ASSETS_CACHE): ``worldmodel/ORG--NAME/COMMIT/`` is a whole, verified world
folder, ``refs/REVISION`` names the commit that a branch or tag stood for, ``COMMIT.part/`` is a download under way. The
client's own cache throws a broken-off download away; here it goes on where it stopped.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from worldmodel.config import WORLDS, find_world
from worldmodel.consent import announce, ask
from worldmodel.errors import CheckpointError, ConfigError, HubError
from worldmodel.hub_errors import explained, no_hub
from worldmodel.hub_transfer import Plan, RemoteFile, download
from worldmodel.sums import NEEDED, SUMS, is_plain_name, verify

NOT_STATED = "not stated"  # a licence
# nothing else of a repository is fetched, so no code and no pickle is
KINDS = {".json", ".jsonl", ".safetensors", ".png", ".md", ".txt", ".jpg", ".webp", ".mp4", ""}


def hub_name(world: str) -> tuple[str, str | None] | None:
    """``[hf://]ORG/NAME[@REVISION]`` -> (ORG/NAME, REVISION), or None for what is, or is meant as, a folder or a bundled world."""
    found = re.fullmatch(r"(hf://)?(\w[\w.-]*)/(\w[\w.-]*)(?:@([\w./-]+))?", world)
    if not found:
        return None
    prefix, owner, name, revision = found.groups()
    if not prefix and (Path(world).exists() or Path(owner).is_dir()):  # "runs/mine" beside a folder "runs" is a slip, not a wish
        return None
    return f"{owner}/{name}", revision


def locate(world: str, revision: str | None = None, offline: bool = False, yes: bool = False) -> tuple[Path, str]:
    """A bundled world, a world folder or ``ORG/NAME`` -> (its folder, the name that opens the very same world again).

    A world of the hub is fetched if it is not here; yes: without asking. Raises ConfigError, CheckpointError or HubError.
    """
    named = hub_name(world)
    if named is None:
        if revision is not None:
            raise ConfigError(f"--revision goes with a world of the hub (ORG/NAME), and {world!r} is none: leave it out")
        folder = find_world(world)
        return folder, world if folder.parent == WORLDS else str(folder.resolve())
    folder = fetch_world(named[0], _one_revision(revision, named[1]), offline, yes)
    return folder, f"hf://{named[0]}@{folder.name}"


def pending(world: str, revision: str | None = None, offline: bool = False) -> Plan | None:
    """What `locate` would fetch, None where it would fetch nothing. Raises as `locate` does."""
    named = hub_name(world)
    found = None if named is None else _resolve(named[0], _one_revision(revision, named[1]), offline)
    return found if isinstance(found, Plan) else None


def fetch_world(repo: str, revision: str | None = None, offline: bool = False, yes: bool = True) -> Path:
    """The verified folder of world `repo` (``ORG/NAME``) at a branch, tag or commit (None: main), fetched first if it is not here.

    Says on stdout what it will fetch before it does, and unless `yes` asks. Without a connection, access, space or a yes, the copy
    that is here is used, and that is said. Raises HubError: unreachable, gated, unknown, no space, no yes, damaged, no whole world.
    """
    found = _resolve(repo, revision, offline)
    if isinstance(found, Path):
        return found
    try:
        if found.gated:
            check_access(repo)
        announce(found.text(), repo, found.folder.parent, found.room)
        if not yes:
            ask("Fetch this once?")
    except HubError as error:
        kept = _kept(repo, found.revision, offline)
        if kept is None:
            raise
        return _use_kept(kept, error)
    try:
        with explained(repo, found.revision):
            download(found)
            _remember(found)
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        raise
    return found.folder


def _use_kept(kept: Path, error: HubError) -> Path:
    print(f"note: {error}; playing the copy that is here, commit {kept.name[:12]}", file=sys.stderr)
    return kept


def _one_revision(flag: str | None, suffix: str | None) -> str | None:
    if flag and suffix and flag != suffix:
        raise ConfigError(f"two revisions are asked for, {suffix!r} and --revision {flag!r}: give one")
    return flag or suffix


def home() -> Path:
    """Where fetched worlds are kept."""
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "worldmodel"


def _home(repo: str) -> Path:
    return home() / repo.replace("/", "--")


def _remember(plan: Plan) -> None:
    """Note which commit the revision stands for today."""
    ref = _ref(plan.repo, plan.revision)
    ref.parent.mkdir(parents=True, exist_ok=True)
    fresh = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
    fresh.write_text(plan.commit + "\n", encoding="utf-8")
    fresh.replace(ref)


def _ref(repo: str, revision: str) -> Path:
    return _home(repo) / "refs" / quote(revision, safe="")


def _kept(repo: str, revision: str, offline: bool) -> Path | None:
    """The folder kept of this revision, if there is one and it is whole. A damaged one goes back to being a part of a download."""
    ref = _ref(repo, revision)
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    folder = _home(repo) / commit
    if not re.fullmatch("[0-9a-f]{40}", commit) or not (folder / "config.json").is_file():
        return None
    try:
        verify(folder)
    except CheckpointError as error:
        if offline:
            raise HubError(f"the copy of {repo} here is damaged ({error}): run once without --offline to mend it") from error
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        folder.rename(part)
        return None
    return folder


def _resolve(repo: str, revision: str | None, offline: bool) -> Path | Plan:
    """The folder that is here, or what has to be fetched."""
    from huggingface_hub import constants

    revision, offline = revision or constants.DEFAULT_REVISION, offline or constants.HF_HUB_OFFLINE
    kept = _kept(repo, revision, offline)
    if offline:
        if kept is None:
            raise HubError(
                f"{repo} at {revision} is not on this machine: run once without --offline (or HF_HUB_OFFLINE) to fetch it"
            )
        return kept
    if kept is not None and kept.name == revision:
        return kept  # a commit never changes: nobody needs to be asked
    try:
        with explained(repo, revision):
            plan = _ask(repo, revision)
    except HubError as error:
        if kept is None or not error.unreachable:
            raise
        return _use_kept(kept, error)
    if _kept(repo, plan.commit, offline) is not None:
        _remember(plan)
        return plan.folder
    return plan


@dataclass(frozen=True)
class Listing:
    """The hub's description of a revision: the commit, the licence in the card, the files by name, and whether everybody sees
    them described, but only those who have accepted the terms may read them."""

    commit: str
    licence: str
    files: dict[str, RemoteFile]
    gated: bool


def listing(repo: str, revision: str) -> Listing:
    """Ask the hub. Raises HubError for an answer that makes no sense, and what the client raises."""
    from huggingface_hub import HfApi, constants

    patience = max(constants.HF_HUB_ETAG_TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT)  # whoever allows more means this, too
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=patience)
    except (AttributeError, KeyError, TypeError) as error:  # JSON of somebody else
        raise HubError(no_hub(repo)) from error
    commit = str(info.sha)
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise HubError(f"the hub's answer about {repo} names no commit: try again later, or check HF_ENDPOINT")
    files = {}
    for entry in info.siblings or ():
        digest = str(entry.lfs.sha256 if entry.lfs else entry.blob_id)
        if not re.fullmatch("[0-9a-f]{64}" if entry.lfs else "[0-9a-f]{40}", digest):  # folders are called by it
            raise HubError(no_hub(repo))
        files[entry.rfilename] = RemoteFile(entry.rfilename, entry.size or 0, digest, entry.lfs is not None)
    licence = str((info.card_data.get("license") if info.card_data else None) or NOT_STATED)[:80]
    return Listing(commit, "".join(c if c.isprintable() else " " for c in licence), files, bool(info.gated))


def check_access(repo: str) -> None:
    """Raise HubError unless the files of a gated repository may be read: what to accept, and where to log in."""
    from huggingface_hub import HfApi

    with explained(repo):
        HfApi().auth_check(repo)


def _ask(repo: str, revision: str) -> Plan:
    """What a world of the hub consists of. Raises HubError if it is no world, and what the client raises."""
    found, files = listing(repo, revision), []
    for name, file in sorted(found.files.items()):
        if any(part.startswith(".") for part in name.split("/")) or Path(name).suffix not in KINDS:
            continue
        if not is_plain_name(name):
            raise HubError(f"{repo} holds a file with the unsafe name {name[:80]!r}: choose another world, and tell its owner")
        files.append(file)
    lacking = sorted({*NEEDED, SUMS} - {file.name for file in files})
    if lacking:
        raise HubError(f"{repo} at {revision} is not a world, it has no {lacking[0]}: check the name, or --revision")
    return Plan(repo, revision, found.commit, found.licence, tuple(files), _home(repo) / found.commit, found.gated)
