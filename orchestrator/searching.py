"""A search that draws as it goes: Optuna's TPE over the cells of a sweep, taken up from the store's rows.

Each cell of the blocks has a study of its own and `num_samples` draws in it. A draw is trained with every seed, and the
study hears of it once all of them have ended: of their mean after the last epoch, or, where the scheduler stopped one,
of the mean by then, which Optuna holds below all that were trained in full.

Each draw has a sampler of its own, whose chance hangs on the search's seed and the draw's number. So a draw is a
function of the results before it, in the order of their `seq`, and of nothing else: a driver that is killed goes on as
if it had not been. Nothing needs to be stored for that but the rows: which trial was drawn when is their position.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mixmo_core.config import flatten, ineffective
from orchestrator.errors import UsageError
from orchestrator.rows import FINAL, TrialRow, config_of
from orchestrator.sweep import Draw, Range, Sweep, Trial

if TYPE_CHECKING:
    import optuna

TRIES = 25
"""So often in a row a study may draw what is known already, or what a rule leaves out, before its cell counts as drawn
out: a range of three whole numbers has no fourth.
"""


def taken_up(sweep: Sweep, rows: Iterable[TrialRow]) -> Sweep:
    """The sweep with all trials of its draws so far, in that order; last those of seeds that the file has got since.
    Rows that the file no longer stands for, under changed settings or ranges, are none of them.
    """
    if not sweep.open_cells:
        return sweep
    own = sorted((row for row in rows if row.sweep == sweep.name), key=lambda row: (row.position, row.trial_id))
    drawn: dict[str, Trial] = {}
    others: dict[str, Trial] = {}
    for row in own:
        found = _drawn_as(sweep, row)
        for trial in found[1] if found is not None else ():
            (drawn if _is(trial, row) else others).setdefault(trial.trial_id, trial)
    trials = (drawn | {each: trial for each, trial in others.items() if each not in drawn}).values()
    return replace(sweep, trials=tuple(replace(trial, position=place) for place, trial in enumerate(trials)))


def _drawn_as(sweep: Sweep, row: TrialRow) -> tuple[int, tuple[Trial, ...]] | None:
    """In which cell a row was drawn, by its number, and the trials of that draw; None where in none."""
    values = flatten(config_of(row))
    for number, cell in enumerate(sweep.open_cells):
        drawn: dict[str, Any] = {}
        trials = cell.trials(_repeated(values, drawn))
        same = [trial for trial in trials if _is(trial, row)]
        if same and all(sweep.search.ranges[name].has(value) for name, value in _told(same[0], drawn, sweep).items()):
            return number, trials
    return None


def _is(trial: Trial, row: TrialRow) -> bool:
    return trial.trial_id == row.trial_id


def _repeated(values: Mapping[str, Any], drawn: dict[str, Any]) -> Draw:
    """The draw of these values; `drawn` gets those that are asked for."""

    def choose(name: str, _: Range) -> Any:
        drawn[name] = values[name]
        return drawn[name]

    return choose


def _told(trial: Trial, drawn: Mapping[str, Any], sweep: Sweep) -> dict[str, Any]:
    """What a study hears of a draw: nothing of a value that has no effect under the others, which no row has either."""
    silent = ineffective(trial.config)
    return {name: value for name, value in drawn.items() if name not in silent}


@dataclass(slots=True)
class _Asked:
    """A draw whose trials have not all ended."""

    study: _Study
    trial: optuna.Trial
    waiting: set[str]
    """Ids of its trials."""
    ended: list[TrialRow] = field(default_factory=list)


class Guide:
    """Draws the trials of a sweep, one draw when one is asked for."""

    def __init__(self, sweep: Sweep, rows: Mapping[int, TrialRow]) -> None:
        """`sweep` as it was taken up, `rows` by its positions. Raises UsageError where Optuna is not installed."""
        check_installed(sweep)
        self._sweep, self._next = sweep, len(sweep.trials)
        self._studies = [_Study(sweep, number) for number in range(len(sweep.open_cells))]
        self._asked: dict[str, _Asked] = {}
        """By the id of each trial that has not ended."""
        for trial in sweep.trials:
            found = _drawn_as(sweep, rows[trial.position])
            if found is not None and trial.trial_id not in self._studies[found[0]].known:
                study = self._studies[found[0]]
                values: dict[str, Any] = {}
                sweep.open_cells[found[0]].trials(_repeated(flatten(trial.config), values))
                self._register(study, found[1], _told(trial, values, sweep))
        for row in sorted(rows.values(), key=lambda row: row.seq):
            self.ended(row)

    @property
    def open(self) -> int:
        """How many of the trials that were drawn have not ended."""
        return len(self._asked)

    @property
    def more(self) -> bool:
        """Whether there may be another draw."""
        return any(study.left for study in self._studies)

    def draw(self) -> list[Trial]:
        """The trials of the next draw, one for each seed; none where there is no further one. Cells take turns."""
        while open_studies := [study for study in self._studies if study.left]:
            study = min(open_studies, key=lambda study: (study.draws, study.number))
            found = study.draw()
            if found is not None:
                trials, values = found
                self._register(study, trials, values)
                placed = [replace(trial, position=self._next + place) for place, trial in enumerate(trials)]
                self._next += len(placed)
                return placed
        return []

    def ended(self, row: TrialRow) -> None:
        """A trial stands so. Of one that has not ended, or was not drawn here, nothing is learned."""
        asked = self._asked.get(row.trial_id)
        if asked is None or row.state not in FINAL:
            return
        del self._asked[row.trial_id]
        asked.waiting.discard(row.trial_id)
        asked.ended.append(row)
        if not asked.waiting:
            asked.study.tell(asked.trial, asked.ended)

    def _register(self, study: _Study, trials: Sequence[Trial], values: Mapping[str, Any]) -> None:
        ids = {trial.trial_id for trial in trials}
        asked = _Asked(study, study.ask(values), ids)
        study.known |= ids
        self._asked |= dict.fromkeys(ids, asked)


class _Study:
    """Optuna's, of one cell."""

    def __init__(self, sweep: Sweep, number: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)  # it would tell of each trial on stderr, which is ours
        self.number, self._cell, self._sweep = number, sweep.open_cells[number], sweep
        self._most, self._metric = sweep.search.num_samples or 0, sweep.scheduler.metric
        self._study = optuna.create_study(direction="maximize" if sweep.scheduler.mode == "max" else "minimize")
        self.draws, self.known, self._is_drawn_out = 0, set[str](), False

    @property
    def left(self) -> bool:
        return self.draws < self._most and not self._is_drawn_out

    def draw(self) -> tuple[tuple[Trial, ...], dict[str, Any]] | None:
        """A draw that is new; None where none was found, and the cell counts as drawn out."""
        for attempt in range(TRIES):
            values: dict[str, Any] = {}
            probe = self._probe(attempt)
            trials = self._cell.trials(_suggesting(probe, values))
            self._study.tell(probe, state=_states().FAIL)  # it is asked again as the config has it: rounded
            if trials and not self.known & {trial.trial_id for trial in trials}:
                return trials, _told(trials[0], values, self._sweep)
        self._is_drawn_out = True
        return None

    def _probe(self, attempt: int) -> optuna.Trial:
        import optuna

        name = f"{self._sweep.search.seed} {self.number} {self.draws} {attempt}"
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        # Gangs run side by side: a draw is to keep away from those that are not over yet.
        self._study.sampler = optuna.samplers.TPESampler(seed=seed, multivariate=False, constant_liar=True)
        return self._study.ask()

    def ask(self, values: Mapping[str, Any]) -> optuna.Trial:
        """Register a draw, of this driver or of an earlier one."""
        self.draws += 1
        ranges = self._sweep.search.ranges
        kept = {name: _kept(ranges[name], value) for name, value in values.items()}
        self._study.enqueue_trial(kept)
        trial = self._study.ask()
        for name in values:
            _suggested(trial, name, ranges[name])
        return trial

    def tell(self, trial: optuna.Trial, rows: Sequence[TrialRow]) -> None:
        """What became of a draw's trials. Those that failed or were cancelled say nothing of it."""
        ended = [row for row in rows if row.state == "TERMINATED" and row.metrics.get(self._metric) is not None]
        reached = [float(row.metrics[self._metric] or 0.0) for row in ended]
        if not reached or not all(map(math.isfinite, reached)):
            self._study.tell(trial, state=_states().FAIL)
        elif any(row.stopped_early for row in ended):
            trial.report(math.fsum(reached) / len(reached), min(row.epoch for row in ended))
            self._study.tell(trial, state=_states().PRUNED)
        else:
            self._study.tell(trial, math.fsum(reached) / len(reached))


def _states() -> Any:
    from optuna.trial import TrialState

    return TrialState


def _suggesting(trial: optuna.Trial, drawn: dict[str, Any]) -> Draw:
    """Optuna's draw; `drawn` gets its values."""

    def choose(name: str, each: Range) -> Any:
        drawn[name] = _suggested(trial, name, each)
        return drawn[name]

    return choose


def _suggested(trial: optuna.Trial, name: str, each: Range) -> Any:
    """Optuna's value for a setting, as a config has it."""
    if each.choices:
        return each.choices[trial.suggest_categorical(name, range(len(each.choices)))]
    assert each.min is not None
    log = each.scale == "log"
    if each.whole:
        low, high = int(each.min), int(each.last)
        return trial.suggest_int(name, low, high, step=int(each.step or 1), log=log)
    return each.tidy(trial.suggest_float(name, each.min, each.last, step=each.step, log=log))


def _kept(each: Range, value: Any) -> Any:
    """A value as Optuna keeps it: choices, which may be lists, by their place."""
    return each.choices.index(value) if each.choices else value


def check_installed(sweep: Sweep) -> None:
    """Raises UsageError where the sweep needs Optuna and it is not there."""
    if sweep.open_cells:
        try:
            import optuna  # noqa: F401
        except ModuleNotFoundError as error:
            if error.name != "optuna":
                raise
            raise UsageError(
                "search.method: optuna needs Optuna, which is not installed: pip install 'mixmo-sweeps[optuna]'. "
                "`search.method: random` does without"
            ) from error
