"""One sweep from plan to done, in one process: it holds the sweep's lease and is the only writer of its tables.

What happened reaches it as the dispatcher's updates; the ledger makes rows of them, and the store's writer keeps them.
The main thread does this and owns the signals; Tune's loop and the gangs live in threads of their own.
"""

import contextlib
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from mixmo_core.config import flatten, shape_of
from orchestrator import budget, canary
from orchestrator import plan as planning
from orchestrator import sweep as sweeps
from orchestrator.calibration import Prediction
from orchestrator.dispatcher import Order, Update
from orchestrator.engine import Crew, Engine, Job, Queue, datasets_of, on_ray
from orchestrator.errors import ExitCode, NotFoundError, RefusedError, UnreachableError
from orchestrator.ledger import Ledger
from orchestrator.origin import origin
from orchestrator.population import needed_by, population_of
from orchestrator.rows import EPOCHS_SCHEMA, FINAL, NO_ERROR, TrialRow, epoch_rows
from orchestrator.searching import Guide, check_installed
from orchestrator.sharing import Sharing
from orchestrator.steering import Steering
from orchestrator.stopping import Judge, judge_of
from orchestrator.store import DamagedError, Inbox, ResultStore, Snapshot, SweepWriter
from orchestrator.store.attempts import attempt_of, progress_of

PERIOD_S = 0.5
"""Between two looks at what happened, when nothing does."""
FORMING_S = 90.0
"""After which the user is told that no worker group has formed yet."""
STORE_PATIENCE_S = 60.0
"""How long the end of a sweep waits for a store that takes nothing. While trials run, the wait has no limit."""
TAKEN_TOGETHER = 256
"""Trials of other sweeps that are written together: the epochs of so many are in memory, row by row, and not of all."""

Observer = Callable[[Snapshot], None]
_STOPPING = "stopping: running trials finish, nothing new starts. Ctrl-C again stops now."
_STOPPING_NOW = "stopping now"


def run(
    sweep: sweeps.Sweep,
    store: ResultStore,
    *,
    data_dir: str | Path | None = None,
    retry_failed: bool = False,
    rehearse: bool = True,
    observer: Observer | None = None,
    engine: Engine = on_ray,
    talk: Callable[[str], None] = lambda line: print(line, file=sys.stderr),  # noqa: T201
) -> ExitCode:
    """Run what is missing of a sweep, and return how it ended.

    `rehearse`: the largest trial takes two steps before any begins (`canary`). `observer` is called from this thread
    about twice a second; `talk` gets the few lines worth saying. Raises SweepError or UsageError before anything starts
    or is written; RefusedError when another driver holds the sweep, its budget is spent or its largest trial does not
    fit; UnreachableError when the store or the cluster is gone. The first Ctrl-C lets running trials finish, the second
    ends now; either way the same command continues.
    """
    planned = planning.against(store, sweep, retry_failed=retry_failed)
    if planned.to_run or planned.sweep.to_draw:
        check(sweep, data_dir)
        hold_to_budget(planned)
    elif not planned.changes and _is_stored(sweep, store):
        talk(nothing_to_run(planned))
        return verdict(store.trial_rows(sweep.name))
    with (
        Signals() as signals,
        store.writer(sweep.name, sweep_text=sweep.text_as_run, lenient=True) as writer,
        Heartbeat(writer) as heartbeat,
    ):
        # Once more, now that no other driver writes.
        planned = planning.against(store, sweep, retry_failed=retry_failed, own=writer.rows)
        sweep = planned.sweep
        ledger = _open_books(sweep, planned, store, writer)
        cancelled = more = False
        if planned.to_run or sweep.to_draw:
            sharing = Sharing.begin(store, planned, writer.fence, ledger)
            guide = Guide(sweep, ledger.rows) if sweep.open_cells else None
            session = _Session(
                sweep, planned, store, writer, ledger, sharing, signals, heartbeat, data_dir, observer, engine, talk,
                guide, rehearse=rehearse,
            )  # fmt: skip
            cancelled = session.run()
            more = guide is not None and guide.more and not cancelled
        done = all(row.state in FINAL for row in ledger.rows.values()) and not more
        writer.close(done=done)
    if done and not cancelled:
        return verdict(list(ledger.rows.values()))
    return signals.code or ExitCode.STOPPED


def _is_stored(sweep: sweeps.Sweep, store: ResultStore) -> bool:
    """Whether readers see this file: it may have got another price or baseline since."""
    try:
        return store.sweep_file(sweep.name) == sweep.text_as_run
    except (NotFoundError, DamagedError):
        return False


def check(sweep: sweeps.Sweep, data_dir: str | Path | None) -> None:
    """Whether the sweep can be run here. Raises SweepError for what no run can honour yet, UsageError for a dataset
    whose files are not as published,
    UnreachableError for a bucket of datasets that cannot be read.
    """
    sweeps.check_runnable(sweep)
    check_installed(sweep)
    budget.check(sweep)
    from orchestrator import datasets

    datasets.check(datasets_of(sweep), None if data_dir is None else str(data_dir))


def hold_to_budget(planned: planning.Plan) -> None:
    """Raises RefusedError where nothing is left of it before anything begins."""
    told = budget.spent(planned.sweep, [item.row for item in planned.items if item.row])
    if told:
        raise RefusedError(f"{planned.sweep.name}: {told}")


def nothing_to_run(planned: planning.Plan) -> str:
    """That all has ended; what has without a result, and how it is run again."""
    named = [(planned.counts.get("failed", 0), "failed"), (planned.counts.get("cancelled", 0), "cancelled")]
    told = ", ".join(f"{count} {word}" for count, word in named if count)
    again = f" ({told}: `mixmo retry` queues them again)" if told else ""
    return f"{planned.sweep.name}: nothing to run, all {len(planned.items)} trials have ended{again}"


def verdict(rows: Sequence[TrialRow]) -> ExitCode:
    return ExitCode.FAULTS if any(row.state == "ERROR" for row in rows) else ExitCode.OK


def _open_books(sweep: sweeps.Sweep, planned: planning.Plan, store: ResultStore, writer: SweepWriter) -> Ledger:
    """The ledger of all planned trials; those to run stand as PENDING under this driver's fence."""
    held = {item.trial.position: item.row or planning.initial_row(item.trial, sweep) for item in planned.items}
    first_seq = max((row.seq for row in [*held.values(), *planned.removed]), default=0)
    for trial in planned.to_run:
        row = held[trial.position]
        held[trial.position] = row.replace(
            state="PENDING", fence=writer.fence, seq=first_seq, stopped_early=False, **NO_ERROR
        )
    for item in planned.items:
        position, label = item.trial.position, item.trial.label
        held[position] = held[position].replace(position=position, label=label, sweep=sweep.name)
    _take_cached(store, writer, [held[item.trial.position] for item in planned.items if item.action == "cached"])
    writer.forget(row.trial_id for row in planned.removed)
    begun = [row for row in planned.removed if row.epoch and row.state not in FINAL]
    writer.put(row.replace(state="CANCELLED", error_cause=planning.REMOVED, seq=first_seq) for row in begun)
    writer.put(held.values())
    writer.flush(force=True)
    configs = {trial.position: trial.config for trial in sweep.trials}
    came_from = asdict(origin()) | {"ray_version": version("ray")}
    return Ledger(held, configs, writer.fence, first_seq, came_from, keep_checkpoint=sweep.checkpoints.keep == "last")


def _take_cached(store: ResultStore, writer: SweepWriter, rows: Sequence[TrialRow]) -> None:
    """Trials that other sweeps have finished, and their epochs. Each of those sweeps is read once, and some trials at a
    time are written with the epochs that they count: there may be millions.
    """
    sources: dict[str, list[TrialRow]] = defaultdict(list)
    for row in rows:
        sources[row.cached_from or ""].append(row)
    for source, taken in sources.items():
        try:
            curves = store.epochs(source)
        except (NotFoundError, DamagedError) as error:  # their curves are lost, their results are not
            curves = EPOCHS_SCHEMA.empty_table()
            writer.event("damaged", f"the epochs of {len(taken):,} trials taken from {source} are not here: {error}")
        for start in range(0, len(taken), TAKEN_TOGETHER):
            some = taken[start : start + TAKEN_TOGETHER]
            writer.add(epoch_rows(curves.filter(pc.field("trial_id").isin([row.trial_id for row in some]))))
            writer.put(some)
            writer.flush(force=True)


class Signals:
    """Ctrl-C and SIGTERM, as wishes that the driver's loop looks at."""

    def __init__(self) -> None:
        self.drain = self.stop = False
        self.code: ExitCode | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        with contextlib.suppress(ValueError):  # not in the main thread: the caller owns the signals
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                self._before[number] = signal.signal(number, self._wish)
        return self

    def take_back(self) -> None:
        """Ray puts handlers of its own there when it starts, and none when it ends."""
        for number in self._before:
            signal.signal(number, self._wish)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _wish(self, number: int, frame: Any) -> None:
        self.code = ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.TERMINATED
        self.stop = self.drain or number != signal.SIGINT
        self.drain = True


class Heartbeat:
    """Renews the lease from a thread of its own, so that nothing slow in the driver makes it look dead."""

    PERIOD_S = 10.0

    def __init__(self, writer: SweepWriter) -> None:
        self._writer, self._stop = writer, threading.Event()
        self._lost: Exception | None = None
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5.0)  # it may hang in a store that hangs

    def check(self) -> None:
        """Raises LeaseLostError when another driver has taken the sweep over, or what else ended the renewing."""
        if self._lost is not None:
            raise self._lost

    def _beat(self) -> None:
        while not self._stop.wait(self.PERIOD_S):
            try:
                self._writer.renew()
            except UnreachableError:
                pass  # the next beat tries again; a store that nobody reaches gives the lease to nobody
            except Exception as error:
                self._lost = error
                return


@dataclass
class _Session:
    """The part of a run in which Ray is up."""

    sweep: sweeps.Sweep
    planned: planning.Plan
    store: ResultStore
    writer: SweepWriter
    ledger: Ledger
    sharing: Sharing
    signals: Signals
    heartbeat: "Heartbeat"
    data_dir: str | Path | None
    observer: Observer | None
    engine: Engine
    talk: Callable[[str], None]
    guide: Guide | None = None
    """It draws trials as others end."""
    store_silent_since: float | None = None
    spent: list[str] = field(default_factory=list)
    """Trials that have ended and whose checkpoints this sweep does not want."""
    passed: set[str] = field(default_factory=set)
    """Trials of a population that were compared, copied or ended."""
    next_drop: float = 0.0
    predicted: bool = False
    rehearse: bool = True
    refusal: str = ""
    """Why the sweep cannot be trained at all."""
    trials: dict[int, sweeps.Trial] = field(init=False)
    """By position, also those drawn meanwhile."""

    def __post_init__(self) -> None:
        self.trials = {trial.position: trial for trial in self.sweep.trials}

    def run(self) -> bool:
        """Whether the sweep was cancelled."""
        to_draw = self.sweep.to_draw
        self._say(
            f"{self.sweep.name}: {len(self.planned.to_run)} of {len(self.sweep.trials)} trials to run"
            f"{f', {to_draw:,} more to be drawn' if to_draw else ''}; starting Ray"
        )
        self._tell_shared()
        job = Job(
            sweep=self.sweep, orders=self._orders(), fence=self.writer.fence, store_uri=self.store.uri,
            data_dir=None if self.data_dir is None else str(self.data_dir), judge=self._judge(), canary=self._canary(),
            population=population_of(self.sweep, self.ledger.rows),
        )  # fmt: skip
        with self._watched(), self.engine(job) as (crew, queue):
            self.signals.take_back()
            inbox = Inbox(self.store.commands(self.sweep.name), self.writer.fence)
            steering = Steering(
                inbox=inbox, writer=self.writer, ledger=self.ledger, crew=crew, sharing=self.sharing,
                order_of=self._order_of, talk=self._say,
            )  # fmt: skip
            try:
                self._follow(crew, queue, steering)
            except BaseException:
                self._part(crew, queue, patience_s=0.0)
                raise
            self._part(crew, queue, patience_s=5.0)
        self.signals.take_back()
        self._settle()
        if self.refusal:
            raise RefusedError(self.refusal)
        return steering.cancelled

    def _canary(self) -> Mapping[str, Any] | None:
        return flatten(canary.largest(self._may_run()).config) if self.rehearse else None

    def _may_run(self) -> Sequence[sweeps.Trial]:
        """The trials to run, and the greatest of those that a search may draw."""
        return [*self.planned.to_run, *(self.sweep.examples if self.sweep.to_draw else ())]

    def _tell_shared(self) -> None:
        shared = len(self.sharing.held_back)
        if shared:
            named = ", ".join(self.sharing.partners)
            self._say(f"{shared} of them are to run in {named} as well, at this moment: each is trained once, for both")

    def _orders(self) -> list[Order]:
        held_back = self.sharing.held_back
        stopped = {item.trial.position: item.stopped for item in self.planned.items if item.runs}
        orders = map(self._order_of, stopped)
        return [
            replace(order, held_back=order.index in held_back, stopped=stopped[order.index]) for order in orders
        ]  # fmt: skip

    def _judge(self) -> Judge | None:
        """The scheduler's, as far as earlier drivers of this sweep had brought it. What other sweeps have trained sets
        no bar here: their results have no place in the order of ours.
        """
        judge = judge_of(self.sweep)
        if judge is not None and any(row.epoch for row in self.ledger.rows.values()):
            at = {row.trial_id: position for position, row in self.ledger.rows.items() if row.cached_from is None}
            seen = [row for row in self.store.epoch_rows(self.sweep.name) if row.trial_id in at]
            for row in sorted(seen, key=lambda row: (row.seq, row.epoch)):
                judge.replay(at[row.trial_id], row.epoch, row.metrics)
        return judge

    def _order_of(self, position: int) -> Order:
        trial, row = self.trials[position], self.ledger.rows[position]
        settings = flatten(trial.config)
        return Order(
            index=position, trial_id=trial.trial_id, settings=settings, shape=shape_of(trial.config),
            attempts=row.attempts, checkpoint=row.checkpoint,
        )  # fmt: skip

    def _follow(self, crew: Crew, queue: Queue, steering: Steering) -> None:
        """Turn what happens into rows until every trial has ended, or the user wants no more."""
        left = {trial.position for trial in self.planned.to_run}
        drained = resubmitted = False
        silent_until = time.monotonic() + FORMING_S
        self._draw(crew, left)
        while left and not (self.signals.stop or steering.stop or self.refusal):
            over = drained and not crew.in_hand()  # asked before the updates, so that none of them is missed
            for update in crew.updates(PERIOD_S):
                silent_until = float("inf")
                self._record(update)
                if update.index is not None:
                    self._heed(update.kind, update.index, crew, left, draw=not (drained or steering.cancelled))
            self._keep()
            if over:
                break
            steering.look()
            left |= steering.again
            steering.again.clear()
            self.sharing.look(crew)
            drained = drained or self._drain(crew, queue, steering)
            if not (drained or resubmitted or queue.is_alive()):
                resubmitted = True
                crew.submit(left)  # whatever became of Tune: a grid needs no more than its order
                if queue.error is not None:
                    self._say(f"Ray Tune ended ({queue.error}); the trials that are left run without it")
            if time.monotonic() > silent_until:
                silent_until = float("inf")
                self._say(f"no worker group has formed in {FORMING_S:.0f} s: Ray is still starting it or has no room")

    def _heed(self, kind: str, position: int, crew: Crew, left: set[int], *, draw: bool) -> None:
        """What else follows when a trial rests or is over."""
        if kind == "paused":
            self.sharing.paused(crew, position)
        if kind in ("ended", "withdrawn"):
            left.discard(position)
            if draw:
                self._draw(crew, left, ended=position)

    def _draw(self, crew: Crew, left: set[int], *, ended: int | None = None) -> None:
        """As many trials as can be trained at once, and no more: each further end makes the next draw wiser. What is
        drawn hangs on nothing but the order in which trials ended.
        """
        if self.guide is None:
            return
        if ended is not None:
            self.guide.ended(self.ledger.rows[ended])
        while self.guide.open < crew.size() and (trials := self.guide.draw()):
            for trial in trials:
                row = self.ledger.open(planning.initial_row(trial, self.sweep), trial.config)
                self.trials[trial.position] = trial
                self.writer.put([row])
                told = ", ".join(f"{name} {flatten(trial.config)[name]}" for name in self.sweep.search.ranges)
                self.writer.event("drawn", told, trial_id=trial.trial_id)
            left |= {trial.position for trial in trials}
            crew.add(map(self._order_of, (trial.position for trial in trials)))

    def _drain(self, crew: Crew, queue: Queue, steering: Steering) -> bool:
        """Whether nothing new is to start, since people want no more or the budget is spent; then see to it."""
        spent = budget.spent(self.sweep, self.ledger.rows.values())
        if not (self.signals.drain or steering.drain or spent):
            return False
        queue.drain()
        crew.drain()
        self.sharing.rest(crew)
        self.writer.stopping()
        self._say(spent or (_STOPPING_NOW if self.signals.stop or steering.stop else _STOPPING))
        if spent:
            self.writer.event("budget", spent)
        return True

    def _part(self, crew: Crew, queue: Queue, *, patience_s: float) -> None:
        """The end of the fleet: write what has arrived, send the gangs home, take what they still say. The queue has
        so much time to end.
        """
        with contextlib.suppress(UnreachableError):
            self.writer.flush(force=True)
        for update in crew.close():
            self._record(update)
        for position, row in self.ledger.rows.items():
            if row.state in ("RUNNING", "PAUSED"):
                self.ledger.rows[position] = row.replace(state="PENDING")
                self.writer.put([self.ledger.rows[position]])
        queue.join(patience_s)

    def _record(self, update: Update) -> None:
        trial_id = None
        if update.kind == "refused":
            self.refusal = canary.refusal(self.sweep.name, canary.largest(self._may_run()), update.text)
        if update.device_name and not self.predicted:
            self._predict(update.device_name)
        if update.index is not None:
            if update.kind == "withdrawn":
                row, epochs = self.ledger.take(update, *self.sharing.taken(update.index))
            else:
                row, epochs = self.ledger.apply(update)
            if update.kind == "started":
                self.sharing.started(update.index)
            trial_id = row.trial_id
            self.writer.add(epochs)
            self.writer.put([row])
            self._mark(update, row)
        if update.kind == "epochs" and update.cause is not None:
            self.writer.event("stopped", update.cause, trial_id=trial_id)
        elif update.kind != "epochs":
            kind = update.state.lower() if update.state else update.kind
            text = update.cause or "all epochs trained" if update.kind == "ended" else update.text
            if update.state == "TERMINATED" and update.stopped_early:
                kind, text = "saved", "as it was when it was stopped"
            self.writer.event(kind, text, trial_id=trial_id, cause=None if kind == "saved" else update.cause)

    def _mark(self, update: Update, row: TrialRow) -> None:
        """Whose checkpoints may have become needless."""
        if update.state == "TERMINATED" and not self.ledger.keep_checkpoint:
            self.spent.append(row.trial_id)
        if update.lineage or update.parent_id or (row.lineage and update.state):
            self.passed |= {row.trial_id, *filter(None, [row.parent_id])}

    def _predict(self, device_name: str) -> None:
        """Write down what the sweep is to take, now that it is known on what, and before anything has been trained. A
        run that goes on with the same trials keeps the prediction of the first.
        """
        self.predicted = True
        told, held = self.planned.prediction(device_name), Prediction.of(self.writer.predicted)
        if told and (held is None or (held.epochs, held.device_name) != (told.epochs, told.device_name)):
            self.writer.predict(told.record())

    def _keep(self, *, force: bool = False) -> None:
        """Write what changed, and show it. A store that is away for a while costs no trial."""
        self.heartbeat.check()
        try:
            spent, over = list(self.spent), self.sharing.over()
            passed = [row for row in self.ledger.rows.values() if row.trial_id in self.passed]
            needed = needed_by(self.ledger.rows.values()) if passed else set()
            if self.writer.flush(force=force) or force:
                self._drop_checkpoints(spent, force=force)
                self._drop_milestones(passed, needed)
                self.sharing.drop(over)
            if self.store_silent_since is not None:
                self._say("the store takes writes again")
            self.store_silent_since = None
        except UnreachableError as error:
            if self.store_silent_since is None:
                self.store_silent_since = time.monotonic()
                self._say(f"{error}. Trials go on; their rows are kept and written when the store is back.")
        self._show()

    def _drop_checkpoints(self, trial_ids: Sequence[str], *, force: bool) -> None:
        """Of trials whose end is written, where the sweep keeps none; but for what another sweep names. Now and then:
        to see what others name may take a twentieth of the time.
        """
        began = time.monotonic()
        if not trial_ids or (began < self.next_drop and not force):
            return
        rows = self.store.all_trial_rows()
        self.next_drop = time.monotonic() + 20 * (time.monotonic() - began)
        named = needed_by(row for row in rows if row.sweep != self.sweep.name or row.trial_id not in trial_ids)
        for trial_id in trial_ids:
            for key in self.store.checkpoints(trial_id):
                if key not in named:
                    self.store.discard(key)
            self.spent.remove(trial_id)

    def _drop_milestones(self, passed: Sequence[TrialRow], needed: Collection[str]) -> None:
        """Of trials of a population, what they saved to be compared and no other may go on from any more. `needed` is
        what the written rows name. What a gang has saved and not told of yet is beyond them, and stays.
        """
        for row in passed:
            for key in self.store.checkpoints(row.trial_id)[2:]:
                told = attempt_of(key) < (row.fence, row.attempt) or progress_of(key)[0] < row.epoch
                if told and key not in needed:
                    self.store.discard(key)
            self.passed.discard(row.trial_id)

    def _show(self) -> None:
        """A screen that fails, its terminal gone say, ends no sweep."""
        if self.observer is not None:
            try:
                self.observer(self.writer.snapshot())
            except Exception as error:
                self.observer = None
                self._say(f"the screen failed ({type(error).__name__}: {error}); the sweep goes on without it")

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError):
            self.talk(line)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Whatever ends the session, the rows that have arrived are written."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):  # the error that is on its way says more
                self.writer.flush(force=True)
            raise

    def _settle(self) -> None:
        """The last write. It waits a minute for a store that is away, then says so."""
        deadline = time.monotonic() + STORE_PATIENCE_S
        self._keep(force=True)
        while self.store_silent_since is not None:
            if time.monotonic() > deadline or self.signals.stop:
                self.writer.flush(force=True)  # raises, and says what the store says
                return
            time.sleep(PERIOD_S)
            self._keep(force=True)
