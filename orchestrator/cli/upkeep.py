"""The commands that keep results in good shape."""

from __future__ import annotations

from orchestrator.cli import streams
from orchestrator.cli.program import AROUND, Command, Json, Results, SweepName, app


@app.command(cls=Command, rich_help_panel=AROUND)
def compact(sweep: SweepName, results: Results = "results", as_json: Json = False) -> None:
    """Make one file of a sweep's epochs.

    Readers are faster by as much as there were files, above all in a bucket. What the file stands for is deleted by a
    later compaction or run, after an hour: somebody may be reading it. Ends with 6 while a driver runs the sweep.
    """
    from orchestrator.store import ResultStore

    done = ResultStore.open(results).compact(sweep)
    if as_json:
        streams.print_json("compact", streams.plain(done))
        return
    print(f"{sweep}: {done.rows:,} rows of epochs")
    print(f"parts   {done.parts_before} before, {done.parts_after} now")
    print(f"bytes   {done.bytes_before:,} before, {done.bytes_after:,} now")
    print(
        f"        {done.bytes_deleted:,} deleted, {done.bytes_waiting:,} to be deleted an hour after they were replaced"
    )
    for name in done.unread:
        streams.say(f"mixmo: {name} cannot be read and stays as it is; `mixmo verify {sweep}` says what to do")
