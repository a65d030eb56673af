"""What runs next: Ray Tune over thin proxies. The only module that imports `ray.tune` for its scheduling.

A Tune trial here is a proxy that knows an index, the searched fields and the deciding metric. It queues its trial with
the dispatcher and waits for the epochs that a gang reports; full rows never pass through Tune, which keeps all that it
is given in memory. Tune's own storage is a scratch folder: a sweep is resumed from the store's rows.
"""

import logging
import math
import shutil
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import ray.tune
from ray.tune.execution import class_cache
from ray.tune.search import Searcher

from orchestrator.dispatcher import SLOT  # not of the fleet: a proxy's process is spared torch

# Tune passes AWS's keys on as a runtime environment, which Ray writes into its logs. A proxy has no use for them, and
# gangs find credentials as every process of their host does.
class_cache.ENV_VARS_TO_PROPAGATE = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if not name.startswith("AWS_")}


class Proxy(ray.tune.Trainable):
    """Stands in Tune for a trial that a gang trains. One process; it takes one trial after another."""

    def setup(self, config: Mapping[str, Any]) -> None:
        self._dispatcher = ray.get_actor(config["dispatcher"], namespace=config["namespace"])
        self._begin(config)

    def reset_config(self, new_config: Mapping[str, Any]) -> bool:
        self._begin(new_config)
        return True

    def _begin(self, config: Mapping[str, Any]) -> None:
        self._index, self._epochs, self._metric = config["index"], config["epochs"], config["metric"]
        self._epoch, self._last = 0, float("nan")
        ray.get(self._dispatcher.submit.remote(self._index))

    def step(self) -> dict[str, Any]:
        """Wait for the next epoch. A trial that ended without it is done: its row says why."""
        self._epoch += 1
        report = ray.get(self._dispatcher.result.remote(self._index, self._epoch))
        if report is not None:
            self._last = report.metrics.get(self._metric, self._last)
        return {self._metric: self._last, "done": report is None or self._epoch == self._epochs}

    def cleanup(self) -> None:
        """What Tune does with a proxy ends no trial: it cleans some up that have only just begun (seen under load, with
        Ray 2.60), and a trial that its gang had yet to take up ended so as if a scheduler had stopped it.
        """

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to save: the trial's state is with its gang and in the store."""

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing to load."""


class Grid(Searcher):
    """Suggests the planned trials in their order, one when one is asked for, and none once it is drained."""

    def __init__(self, suggestions: Sequence[Mapping[str, Any]], metric: str) -> None:
        super().__init__(metric=metric, mode="max")
        self._waiting = list(reversed(suggestions))
        self._drained = False  # a plain flag: Tune pickles its searcher

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._drained or not self._waiting:
            return str(Searcher.FINISHED)
        return dict(self._waiting.pop())

    def drain(self) -> None:
        self._drained = True

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """A grid learns nothing from results."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: a sweep is resumed from the store."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


class Tuning(threading.Thread):
    """Ray Tune's loop over the trials to run, off the main thread, which keeps the signals."""

    def __init__(
        self,
        trials: Sequence[tuple[int, int]],
        *,
        dispatcher: str,
        namespace: str,
        metric: str,
        at_once: int,
        slots: bool,
    ) -> None:
        """`trials` are (index, epochs) in the order to run, `at_once` of them; `slots`: the cluster counts them."""
        super().__init__(name="tune", daemon=True)
        common = {"dispatcher": dispatcher, "namespace": namespace, "metric": metric}
        self._grid = Grid([{"index": index, "epochs": epochs, **common} for index, epochs in trials], metric)
        # Ray counts resources in ten-thousandths. Every head has 1 of the second resource, so that no CPU is taken up.
        share = math.floor(9_000 / at_once) / 10_000
        self._needs = {"cpu": 0, SLOT if slots else "node:__internal_head__": share}
        self.error: BaseException | None = None

    def run(self) -> None:
        for name in ("ray.tune", "ray.tune.tuner", "ray.air"):
            logging.getLogger(name).setLevel(logging.ERROR)
        scratch = tempfile.mkdtemp(prefix="mixmo-tune-")
        try:
            ray.tune.Tuner(
                ray.tune.with_resources(Proxy, self._needs),
                tune_config=ray.tune.TuneConfig(search_alg=self._grid, num_samples=-1, reuse_actors=True),
                run_config=ray.tune.RunConfig(
                    name="sweep",
                    storage_path=scratch,
                    verbose=0,
                    checkpoint_config=ray.tune.CheckpointConfig(checkpoint_at_end=False, checkpoint_frequency=0),
                ),
            ).fit()
        except BaseException as error:  # the driver sees it, and submits what is left itself
            self.error = error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def drain(self) -> None:
        """Suggest no further trial."""
        self._grid.drain()
