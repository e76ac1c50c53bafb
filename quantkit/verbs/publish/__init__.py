"""The verb `publish`: a folder into a repository on the Hub, or into a branch of one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from quantkit.containers import of_folder
from quantkit.errors import OutputError, UsageError
from quantkit.options.verbs import Publish
from quantkit.progress import SILENT, Progress, size
from quantkit.report import Report
from quantkit.runs.atomic import absolute
from quantkit.runs.links import foreign_files
from quantkit.verbs import verb
from quantkit.verbs.publish.files import Change, LocalFile, changes_between, is_result, local_files
from quantkit.verbs.publish.remote import Remote, RemoteState, check_token
from quantkit.version import __version__

_BRANCH = re.compile(r"(?!.*(\.\.|//|@\{|\.lock$))[\w][\w./-]*(?<![./])")
_SHOWN = 3


@dataclass(frozen=True)
class PublishReport(Report):
    """What `publish` did, or with `dry_run` would do.

    Attributes:
        repo: owner/name.
        private: whether only the owner sees it.
        created: whether the repository is new.
        changes: every file of the folder and of the branch, and what happens to it.
        bytes: of the files that are new or changed.
        commit: that holds them now; None of a dry run.
        looked: whether the Hub was looked at. A dry run goes without a token or network, and everything counts as new.
    """

    repo: str
    branch: str
    private: bool
    created: bool
    changes: list[Change]
    bytes: int
    commit: str | None = None
    dry_run: bool = False
    looked: bool = True

    def lines(self) -> Iterator[str]:
        where = f"{self.repo}, branch {self.branch}"
        seen = ("private" if self.private else "public") + (", new" if self.created else "")
        seen = seen if self.looked else "not looked at"
        shown = [change for change in self.changes if is_result(change.path) or not change.path.startswith(".")]
        acted = [change for change in shown if change.state != "same"]
        sent = sum(change.state in ("new", "changed") for change in acted)
        deleted = sum(change.state == "deleted" for change in acted)
        if not sent and not deleted:
            yield f"{where} ({seen}): nothing to send"
            return
        counts = [f"{sent} file{'' if sent == 1 else 's'}"]
        if deleted:
            counts.append(f"delete {deleted}" if self.dry_run else f"deleted {deleted}")
        yield f"{'would send' if self.dry_run else 'sent'} {' and '.join(counts)} to {where} ({seen})"
        for change in acted:
            yield f"{change.state:<8} {size(change.bytes):>9}  {change.path}"
        yield f"{size(self.bytes)} to send" if self.dry_run else f"commit {self.commit}"


@verb(Publish)
def publish(options: Publish, *, progress: Progress = SILENT) -> PublishReport:
    """Make a branch of a model repository hold what a folder holds, through the Hub's own client.

    Only files that differ from the branch's are sent, as one commit; where none does there is no commit. Files that
    arrived before a failure are not sent again by the next call. The token is the Hub client's: HF_TOKEN, or that of
    `hf auth login`.

    Raises:
        UsageError: no such folder, a pattern without files, a name that the Hub does not accept.
        OutputError: problems in the folder, no token or the wrong one, or the Hub cannot be reached; says whether the
            same command goes on.
    """
    root = absolute(options.folder)
    files = local_files(root, options.only)
    for path in foreign_files(root):
        progress.warn(f"{path.relative_to(root)} is a link to outside {options.folder}, and is not sent")
    target = branch_of(root) if options.branch == "auto" else options.branch
    if not _BRANCH.fullmatch(target):
        raise UsageError(f"--branch {target}: not a name for a branch")
    if options.dry_run:
        repo, looked = _glance(options.repo, target, progress)
        state = looked or RemoteState(None, None, {})
    else:
        check_token()
        remote = Remote(options.repo, target, progress)
        repo, state = remote.repo, remote.persist(remote.look)
        looked = state
    if looked is not None:
        _say(repo, state, options.public, progress)
    if "README.md" not in files and "README.md" not in state.files:
        progress.warn(f"{options.folder} has no README.md: `quantkit card` writes one")
    if options.verify:
        problems = _problems(root, options, progress)
        if problems:
            more = f"; {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            found = "; ".join(problems[:_SHOWN]) + more
            raise OutputError(f"not published, `quantkit verify` finds: {found}; --no-verify publishes it as it is")
    changes = changes_between(files, state.files, options.delete)
    sent = sum(change.bytes for change in changes if change.state in ("new", "changed"))
    private = not options.public if state.private is None else state.private
    report = PublishReport(
        repo, target, private, state.private is None, changes, sent, dry_run=True, looked=looked is not None
    )
    if options.dry_run:
        return report
    text = options.message or f"Upload with quantkit {__version__}"
    commit = remote.persist(lambda: _attempt(remote, files, options.public, options.delete, text))
    return replace(report, commit=commit, dry_run=False)


def _problems(root: Path, options: Publish, progress: Progress) -> list[str]:
    """What `quantkit verify` finds; a dry run only what it finds without torch."""
    from quantkit.verbs.verify import glance, verify

    if not options.dry_run:
        return verify(root, trust_remote_code=options.trust_remote_code, progress=progress).problems
    progress.note("a dry run looks at files and headers; before it sends, publish verifies weights and tokenizer too")
    return glance(root, options.trust_remote_code, progress).problems


def branch_of(folder: Path) -> str:
    """The name of a variant's branch, as repositories of 2023 had them.

    Raises:
        UsageError: no folder of codes.
    """
    from quantkit.containers.hf.read import quantization_of
    from quantkit.sources import open_source

    found = quantization_of(folder) if (folder / "config.json").is_file() else {}
    container = of_folder(found)
    if container is None or container.recipe != "checkpoint":
        raise UsageError(
            "--branch auto names branches after bits and groups; this is no GPTQ folder or other one of codes: name it"
        )
    said = found if "bits" in found else open_source(folder).settings
    return branch_name(said.get("bits"), said.get("group_size"), bool(said.get("desc_act")), container.name)


def branch_name(bits: object, group_size: object, desc_act: bool, kind: str) -> str:
    """The same from its settings: gptq-4bit-32g-actorder_True."""
    return f"{kind}-{bits}bit-{group_size}g-actorder_{desc_act}"


def _glance(repo: str, branch: str, progress: Progress) -> tuple[str, RemoteState | None]:
    """The repository's full name and state for a dry run, which needs neither token nor network: None without."""
    try:
        remote = Remote(repo, branch, progress, waits=())
        return remote.repo, remote.persist(remote.look)
    except OutputError as error:
        why = str(error).removeprefix(f"{repo}: ").partition(";")[0]
        progress.note(f"{why}; without a look at the Hub every file counts as new")
        return repo, None


def _attempt(remote: Remote, files: dict[str, LocalFile], public: bool, delete: bool, message: str) -> str:
    """Bring the branch to the folder's state from wherever it is, and look whether it got there; its commit."""
    state = remote.look()
    if state.head is None:
        remote.create(state, public)
        state = remote.look()
    changes = changes_between(files, state.files, delete)
    added = {change.path: files[change.path] for change in changes if change.state in ("new", "changed")}
    deleted = [change.path for change in changes if change.state == "deleted"]
    if not added and not deleted:
        return str(state.head)
    commit = remote.commit(added, deleted, message, state.head)
    after = changes_between(files, remote.look().files, delete)
    lost = [change.path for change in after if change.state in ("new", "changed")]
    if lost:
        raise OutputError(f"{remote.repo}: the Hub did not take {', '.join(lost[:_SHOWN])}; is there a .gitignore?")
    return commit


def _say(repo: str, state: RemoteState, public: bool, progress: Progress) -> None:
    """Whether a repository is public is nothing to find out afterwards."""
    if state.private is None:
        progress.note(f"{repo} is new, and will be {'public' if public else 'private (--public makes it public)'}")
    elif state.private and public:
        progress.warn(f"{repo} is private and stays so: make it public in its settings on the Hub")
    elif not state.private and not public:
        progress.warn(f"{repo} is public already: everybody will see what is uploaded")
