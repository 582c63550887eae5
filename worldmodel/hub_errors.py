"""What can go wrong between here and the hub, each as one sentence that names the fix. No torch."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError

from worldmodel.errors import HubError

LOG_IN = "log in with `hf auth login` (or set HF_TOKEN)"
_FULL = {errno.ENOSPC, errno.EDQUOT}
_NOT_OURS = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def explained(repo: str, revision: str = "main", kept: bool = True) -> Iterator[None]:
    """Turn whatever the hub's client raises in this block into a HubError. kept: what has arrived stays for the next attempt."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        raise HubError(_refusal(error, status, repo, revision), unreachable=status >= 500) from error
    except LocalTokenNotFoundError as error:
        raise HubError(f"{repo} needs an account: {LOG_IN} and run the same command again") from error
    except HFValidationError as error:
        raise HubError(f"{repo!r} is no name that the hub knows: give ORG/NAME of letters, digits, '-', '_' and '.'") from error
    except (OSError, HTTPError) as error:
        local = isinstance(error, OSError) and error.errno in _FULL | _NOT_OURS
        raise HubError(_local(error, repo) if local else _broken(error, repo, kept), unreachable=not local) from error
    except JSONDecodeError as error:
        raise HubError(no_hub(repo), unreachable=True) from error
    except ValueError as error:  # the hub's answer, or its judgement of a card
        raise HubError(f"the hub does not take {repo}: {_first_line(error)}; mend that and run the same command again") from error


def no_hub(repo: str) -> str:
    """The sentence for an answer that no hub gives."""
    from huggingface_hub import constants

    where = f"{constants.ENDPOINT} answers for {repo} as no hub does"
    return f"{where}: check HF_ENDPOINT, the proxy, or whether this network wants a log-in page first"


def _refusal(error: Exception, status: int, repo: str, revision: str) -> str:
    """The sentence for an answer of the hub that is a no."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: accept its terms at {page}, {LOG_IN}, and run the same command again"
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"{repo} has no revision {revision!r}: leave out --revision, or take a branch, tag or commit from {page}/commits/main"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{constants.ENDPOINT} shows no repository {repo}: check the name; if it is private, {LOG_IN}"
    if isinstance(error, errors.EntryNotFoundError):
        return f"{repo} has lost a file since it was listed: run the same command again"
    if status == 401:
        return f"the hub refuses the token: {LOG_IN} with a valid one, or log out and unset HF_TOKEN if {repo} is public"
    if status == 403:
        return f"the token may not do this with {repo}: change its rights at {constants.ENDPOINT}/settings/tokens, or {LOG_IN}"
    if status == 429:
        return "the hub asks to slow down (429): wait a few minutes and run the same command again"
    return f"the hub answers {status or 'nonsense'} for {repo}: try again later, or see its status page"


def _broken(error: Exception, repo: str, kept: bool) -> str:
    """The sentence for a connection that fails."""
    from huggingface_hub import constants

    again = "run the same command again" + (", it goes on where it stopped" if kept else "")
    if "UnsupportedProtocol" in type(error).__name__:
        return f"HF_ENDPOINT is {constants.ENDPOINT!r}, which is no address of a hub: begin it with https://, or unset it"
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:  # the client's library differs between its versions
        return f"{constants.ENDPOINT} is silent for too long: {again}, or allow more seconds with HF_HUB_DOWNLOAD_TIMEOUT"
    if "Connect" in type(error).__name__ or isinstance(error, ConnectionError):
        return f"{constants.ENDPOINT} cannot be reached ({_first_line(error)}): check the network (or HF_ENDPOINT, the proxy)"
    return f"the connection for {repo} broke ({_first_line(error)}): {again}"


def _local(error: Exception, repo: str) -> str:
    where = f" at {error.filename}" if isinstance(error, OSError) and error.filename else ""
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"the disk is full{where} while {repo} is written: free some space, or set HF_HOME to another disk"
    return f"{repo} cannot be written{where}: change the folder's rights, or set HF_HOME to a folder of yours"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
