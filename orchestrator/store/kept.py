"""A second copy of a sweep's trials, on a store whose swap is no fence, where an older driver may overwrite them.

There a driver that is held up in the middle of a write, for however long, replaces what others wrote meanwhile. Each
driver therefore keeps a copy under a name of its own fence, which no other touches, and writes it first. The older
driver puts the newest copy back when it sees what it did. If it dies before, the driver that lives rewrites the trials
at its next renewal, and if that one has ended, the next driver begins with the copy.
"""

from orchestrator.errors import NotFoundError
from orchestrator.rows import TRIALS_REQUIRED, TRIALS_SCHEMA
from orchestrator.store.lease import read_lease
from orchestrator.store.tables import Header, SweepFiles, decode


def keep(files: SweepFiles, fence: int, data: bytes) -> None:
    """To be called before `trials.parquet` gets this content."""
    if not files.folder.fenced:
        files.folder.put(_key(files, fence), data)


def put_back(files: SweepFiles) -> None:
    """Make `trials.parquet` the newest copy again, should it be older. Raises DamagedError, UnreachableError."""
    if files.folder.fenced:
        return
    try:
        held = files.trials()[1]
    except NotFoundError:
        held = Header()
    lease = read_lease(files.folder, f"{files.key}/lease.json")
    for fence in range(lease.fence if lease else 0, max(held.fence, 1) - 1, -1):
        stored = files.folder.read(_key(files, fence))
        if stored is not None:
            kept = Header.of(decode(stored.data, _key(files, fence), TRIALS_SCHEMA, TRIALS_REQUIRED))
            if (kept.fence, kept.generation) > (held.fence, held.generation):
                files.folder.put(f"{files.key}/trials.parquet", stored.data)
            return


def forget(files: SweepFiles, before: Header, fence: int) -> None:
    """Delete the copies of earlier drivers, once this one has kept its own."""
    if not files.folder.fenced:
        for earlier in range(max(1, before.fence), fence):
            files.folder.delete(_key(files, earlier))


def _key(files: SweepFiles, fence: int) -> str:
    """Begins with a dot: no listing shows it, and no reader of Parquet takes it in."""
    return f"{files.key}/.trials-{fence}.parquet"
