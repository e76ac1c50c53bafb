"""A repository on the Hub through the Hub's own client: looked at, created, written to.

The token is the client's own (HF_TOKEN, or what `hf auth login` has stored): it is never taken from elsewhere, and no
message holds it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors, get_token
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
)

from quantkit.errors import OutputError, QuantkitError, UsageError, first_line
from quantkit.progress import Progress
from quantkit.sources.hub import quiet_client
from quantkit.verbs.publish.files import LocalFile, RemoteFile
from quantkit.version import __version__

T = TypeVar("T")

# Seconds between attempts that got nowhere; the client itself retries requests within each.
_WAITS: Sequence[float] = (2, 8, 30)
_NO_TOKEN = "no token for the Hub: log in with `hf auth login`, or set HF_TOKEN"
_LATER = (408, 429)  # statuses below 500 that mean: try again


@dataclass(frozen=True)
class RemoteState:
    """What a repository's branch holds. Without the repository `private` is None, without the branch `head`."""

    private: bool | None
    head: str | None
    files: Mapping[str, RemoteFile]


class Remote:
    """A branch of a model repository.

    Attributes:
        repo: its full name, owner/name.
        branch: the branch.
        uploaded: files that its store has by now: as long as they become more, failures are not counted.
    """

    def __init__(self, repo: str, branch: str, progress: Progress, waits: Sequence[float] = _WAITS) -> None:
        self._api = HfApi(library_name="quantkit", library_version=__version__)
        self._progress, self._waits = progress, waits
        self.branch, self.uploaded = branch, set[str]()
        self.repo = repo if "/" in repo else self.persist(lambda: f"{self._api.whoami()['name']}/{repo}", repo)

    def persist(self, work: Callable[[], T], name: str | None = None) -> T:
        """Do work on the Hub, again after a dropped connection or a failure of the server, a few times.

        Raises:
            UsageError: the Hub does not accept the name.
            OutputError: what the Hub refuses, or that it could not be reached.
        """
        name, failures, before = name or self.repo, 0, len(self.uploaded)
        while True:
            try:
                with _silent():
                    return work()
            except QuantkitError:
                raise
            except Exception as error:  # of the client, of the HTTP library under it, and of Xet's
                failures = failures + 1 if len(self.uploaded) == before else 1
                before = len(self.uploaded)
                if not _may_pass(error) or failures > len(self._waits):
                    # A traceback would show what a server has quoted.
                    quoted = any(_without_token(str(cause)) != str(cause) for cause in _chain(error))
                    raise _explained(error, name) from (None if quoted else error)
                wait = self._waits[failures - 1]
                self._progress.note(f"{name}: {_line(error)}; again in {wait} s")
            time.sleep(wait)

    def look(self) -> RemoteState:
        """The branch as it is now."""
        try:
            private = bool(self._api.repo_info(self.repo).private)
        except errors.RepositoryNotFoundError:
            return RemoteState(None, None, {})
        try:
            head = str(self._api.repo_info(self.repo, revision=self.branch).sha)
        except errors.RevisionNotFoundError:
            return RemoteState(private, None, {})
        tree = self._api.list_repo_tree(self.repo, revision=head, recursive=True)
        files = {}
        for e in tree:
            if isinstance(e, RepoFile):
                kept = (e.size, e.blob_id, False) if e.lfs is None else (e.lfs.size, e.lfs.sha256, True)
                files[e.path] = RemoteFile(*kept)
        return RemoteState(private, head, files)

    def create(self, state: RemoteState, public: bool) -> None:
        """Make what is missing: the repository, the branch. A branch begins at the repository's first commit."""
        if state.private is None:
            self._api.create_repo(self.repo, private=not public, exist_ok=True)
        if state.head is None and self.branch != "main":
            first = self._api.list_repo_commits(self.repo)[-1].commit_id
            self._api.create_branch(self.repo, branch=self.branch, revision=first, exist_ok=True)

    def commit(self, added: Mapping[str, LocalFile], deleted: Sequence[str], message: str, parent: str | None) -> str:
        """Upload files and make one commit of them; the commit. What the store has already is not sent again.

        A commit to the branch since `parent` was looked at is a refusal, so nobody's work is undone.
        """
        with self._progress.phase("uploading", len(added)) as advance, ExitStack() as opened:
            # Whether the server hands out tokens for Xet storage. The client takes that for granted.
            url = f"{self._api.endpoint}/api/models/{self.repo}/xet-write-token/{self.branch}"
            xet = get_session().get(url, headers=build_hf_headers()).status_code != 404
            operations: list[Any] = []
            for name, file in added.items():
                self._progress.detail(name)
                operation = CommitOperationAdd(name, str(file.path))
                if True in file.known:
                    operation.upload_info.sha256 = bytes.fromhex(file.known[True])
                if not xet:  # the client sends a path by Xet wherever that is installed, an open file by git LFS
                    operation.path_or_fileobj = opened.enter_context(file.path.open("rb"))
                self._api.preupload_lfs_files(self.repo, [operation], revision=self.branch, free_memory=False)
                file.known[True] = operation.upload_info.sha256.hex()
                self.uploaded.add(name)
                operations.append(operation)
                advance(1)
            operations += map(CommitOperationDelete, deleted)
            to: Any = {"revision": self.branch, "parent_commit": parent}
            done = self._api.create_commit(self.repo, operations, commit_message=message, **to)
        return str(done.oid)


def check_token() -> None:
    """Raise OutputError where the Hub client has no token."""
    if get_token() is None:
        raise OutputError(_NO_TOKEN)


@contextmanager
def _silent() -> Iterator[None]:
    """The client without its bars and warnings: this package has its own."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with quiet_client():
            yield
    finally:
        if shown:
            enable_progress_bars()


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it came of."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status that it is about."""
    answers = (getattr(e, "response", None) for e in _chain(error) if isinstance(e, errors.HfHubHTTPError))
    return next((int(answer.status_code) for answer in answers if answer is not None), None)


def _may_pass(error: BaseException) -> bool:
    """Whether another attempt can end otherwise: a failing server, a lost connection."""
    status = _status(error)
    if status is not None:
        return status >= 500 or status in _LATER
    if any(isinstance(e, errors.OfflineModeIsEnabled) for e in _chain(error)):
        return False
    # The HTTP library's own: httpx's or httpx2's, by the client's release.
    kinds = (kind for e in _chain(error) for kind in type(e).__mro__)
    return any(kind in (ConnectionError, TimeoutError) or kind.__name__ == "TransportError" for kind in kinds)


def _explained(error: Exception, name: str) -> QuantkitError:
    """One line for what the client raised."""
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"{name}: not a name that the Hub accepts; write OWNER/NAME")
    if any(isinstance(e, errors.OfflineModeIsEnabled) for e in _chain(error)):
        return OutputError(f"{name}: HF_HUB_OFFLINE is set; unset it to publish")
    if isinstance(error, errors.LocalTokenNotFoundError):
        return OutputError(_NO_TOKEN)
    status = _status(error)
    reasons = {
        401: "the Hub does not accept the token; `hf auth login` stores another, HF_TOKEN counts before that one",
        403: "the token may not write there; it needs the right to write, and OWNER must be you or yours",
        404: "the Hub has no such repository, or shows it to others only",
        412: "somebody has committed to it meanwhile; run the command again",
    }
    if status in reasons:
        return OutputError(f"{name}: {reasons[status]}")
    if _may_pass(error):
        return OutputError(
            f"{name}: the Hub fails or cannot be reached ({_line(error)}); files that arrived are kept, the same "
            "command goes on with the rest"
        )
    return OutputError(f"{name}: {_line(error)}")


def _line(error: BaseException) -> str:
    """The first line of the innermost cause that says something, without keys of signed addresses and the token."""
    causes = [cause for cause in _chain(error) if str(cause).strip()]
    told = next((cause for cause in causes if isinstance(cause, errors.HfHubHTTPError)), None)
    line = first_line(told or (causes[0] if causes else error))
    if told is None and len(causes) > 1 and line.startswith("Error while uploading"):
        line = first_line(causes[1])
    return _without_token(re.sub(r"\?\S*", "", line))


def _without_token(text: str) -> str:
    token = get_token()
    return text.replace(token, "<token>") if token else text
