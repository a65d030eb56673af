"""What runs next: Ray Tune over thin proxies. The only module that imports `ray.tune` for its scheduling.

A Tune trial here is a proxy for a page of the sweep's trials: it queues them with the dispatcher, and is done when all
have been taken up. Tune keeps a process for each trial that runs and 26 kB for each that it was ever given; a page
costs that once for hundreds of trials, and hundreds of gangs and slots find work at once. Results never pass through
Tune. Its own storage is a scratch folder: a sweep is resumed from the store's rows.
"""

import logging
import shutil
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import ray.tune
from ray.tune.execution import class_cache
from ray.tune.search import Searcher

PAGE = 256
"""Trials that one proxy queues: the next proxy, whose process takes a second or two to start, is there in time."""
PAGES = 2
"""Proxies at once."""

# Tune passes AWS's keys on as a runtime environment, which Ray writes into its logs. A proxy has no use for them, and
# gangs find credentials as every process of their host does.
class_cache.ENV_VARS_TO_PROPAGATE = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if not name.startswith("AWS_")}


class Proxy(ray.tune.Trainable):
    """Stands in Tune for the trials of a page."""

    def setup(self, config: Mapping[str, Any]) -> None:
        self._dispatcher = ray.get_actor(config["dispatcher"], namespace=config["namespace"])
        self._page = config["page"]

    def step(self) -> dict[str, Any]:
        """Queue them, and wait until gangs have them: what comes next is then for Tune to say."""
        ray.get(self._dispatcher.offer.remote(self._page))
        return {"done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to save: the trials' states are with their gangs and in the store."""

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing to load."""


class Grid(Searcher):
    """Suggests the planned trials in their order, a page when one is asked for, and none once it is drained."""

    def __init__(self, indices: Sequence[int], common: Mapping[str, Any]) -> None:
        """`common` is what every suggestion holds besides its page."""
        super().__init__()
        pages = [list(indices[start : start + PAGE]) for start in range(0, len(indices), PAGE)]
        self._waiting = [{"page": page, **common} for page in reversed(pages)]
        self._drained = False  # a plain flag: Tune pickles its searcher

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._drained or not self._waiting:
            return str(Searcher.FINISHED)
        return self._waiting.pop()

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

    def __init__(self, indices: Sequence[int], *, dispatcher: str, namespace: str) -> None:
        """`indices` are those of the trials, in the order to run; `dispatcher` is the name of its actor."""
        super().__init__(name="tune", daemon=True)
        self._grid = Grid(indices, {"dispatcher": dispatcher, "namespace": namespace})
        self.error: BaseException | None = None

    def run(self) -> None:
        for name in ("ray.tune", "ray.tune.tuner", "ray.air"):
            logging.getLogger(name).setLevel(logging.ERROR)
        scratch = tempfile.mkdtemp(prefix="mixmo-tune-")
        # Every head has 1 of the second. Tune refuses what needs nothing; so little leaves room for other sweeps'.
        needs = {"cpu": 0, "node:__internal_head__": 0.01}
        try:
            ray.tune.Tuner(
                ray.tune.with_resources(Proxy, needs),
                tune_config=ray.tune.TuneConfig(search_alg=self._grid, num_samples=-1, max_concurrent_trials=PAGES),
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
