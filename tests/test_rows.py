"""Rows and their tables are the same thing, in both directions, for every config there can be."""

import json
import math
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_rows import NOTHING, epoch, trial
from strategies import configs

from mixmo_core.config import TrialConfig, cell_id, digest, identity, ineffective, leaves, trial_id
from orchestrator.rows import (
    CONFIG_COLUMNS,
    EPOCHS_SCHEMA,
    METRIC_COLUMNS,
    TRIALS_REQUIRED,
    TRIALS_SCHEMA,
    TrialRow,
    config_columns,
    config_of,
    epoch_rows,
    records,
    to_table,
    trial_rows,
)

NUMBERS = st.none() | st.floats(allow_nan=False)
METRICS = st.fixed_dictionaries(dict.fromkeys(METRIC_COLUMNS, NUMBERS))
TIMES = st.none() | st.datetimes(datetime(1970, 1, 2), datetime(2200, 1, 1), timezones=st.just(UTC))


def row_of(config: TrialConfig, **columns: object) -> TrialRow:
    whole = digest(identity(config))
    given: dict[str, object] = {
        "sweep": "made", "position": 0, "trial_id": whole[:12], "digest": whole, "cell_id": cell_id(config),
        "epochs": config.optim.epochs, "config": config_columns(config), "metrics": NOTHING,
    }  # fmt: skip
    return TrialRow(**{**given, **columns})  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(config=configs())
def test_a_row_has_the_config_it_stands_for(config: TrialConfig) -> None:
    back = trial_rows(to_table([row_of(config)], TRIALS_SCHEMA))[0]
    assert trial_id(config_of(back)) == trial_id(config)
    assert config_columns(config_of(back)) == config_columns(config)


@settings(max_examples=60, deadline=None)
@given(config=configs(), metrics=METRICS, began=TIMES, text=st.none() | st.text(), count=st.integers(0, 2**62))
def test_trial_rows_survive_the_table(
    config: TrialConfig, metrics: dict[str, float | None], began: datetime | None, text: str | None, count: int
) -> None:
    row = row_of(config, metrics=metrics, started_at=began, error=text, seq=count, git_dirty=True, train_flops=1e21)
    assert trial_rows(to_table([row], TRIALS_SCHEMA)) == [row]


@given(metrics=METRICS, number=st.integers(1, 10**6), seconds=st.floats(0, 1e9))
def test_epoch_rows_survive_the_table(metrics: dict[str, float | None], number: int, seconds: float) -> None:
    row = epoch(trial(), number)
    row = type(row)(**{**{name: getattr(row, name) for name in row.__slots__}, "metrics": metrics, "wall_s": seconds})
    assert epoch_rows(to_table([row], EPOCHS_SCHEMA)) == [row]


def test_not_a_number_is_not_null() -> None:
    row = row_of(TrialConfig(), metrics={**NOTHING, "loss": math.nan})
    back = trial_rows(to_table([row], TRIALS_SCHEMA))[0]
    assert math.isnan(back.metrics["loss"] or 0.0)
    assert back.metrics["top1"] is None


def test_settings_without_effect_are_null_and_all_is_a_count() -> None:
    columns = config_columns(TrialConfig())
    assert (columns["data_train_images"], columns["model_encoders"], columns["model_classifiers"]) == (50_000, 2, 2)
    for config in (TrialConfig(), config_of(trial(subnetworks=1))):
        silent = {name.replace(".", "_") for name in ineffective(config)}
        assert {name for name, value in config_columns(config).items() if value is None} == silent
    assert config_columns(config_of(trial(subnetworks=1)))["mixing_method"] is None


def test_columns_are_settings_and_metrics_by_name() -> None:
    assert tuple(name.replace(".", "_") for name, _ in leaves()) == CONFIG_COLUMNS
    assert len(set(TRIALS_SCHEMA.names)) == len(TRIALS_SCHEMA.names)
    assert {*CONFIG_COLUMNS, *METRIC_COLUMNS} < set(TRIALS_SCHEMA.names)
    assert set(METRIC_COLUMNS) < set(EPOCHS_SCHEMA.names) < set(TRIALS_SCHEMA.names)


def test_no_column_changes_its_type_or_goes() -> None:
    """Tables of earlier versions stay readable: columns are added, at the end of tests/golden/schema.json."""
    held = json.loads((Path(__file__).parent / "golden" / "schema.json").read_text())
    for name, schema in (("trials", TRIALS_SCHEMA), ("epochs", EPOCHS_SCHEMA)):
        now = {spec.name: str(spec.type) for spec in schema}
        assert {column: now.get(column) for column in held[name]} == held[name]
        assert set(now) == set(held[name]), "record the new columns in tests/golden/schema.json"


@given(st.lists(st.none() | st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC))))
def test_records_are_those_of_arrow(times: list[datetime | None]) -> None:
    table = pa.table({"t": pa.array(times, pa.timestamp("us", "UTC")), "n": list(range(len(times)))})
    assert records(table) == table.to_pylist()
    coarse = table.set_column(0, "t", table.column("t").cast(pa.timestamp("s", "UTC"), safe=False))
    assert records(coarse) == coarse.to_pylist()


def test_times_are_stored_in_utc() -> None:
    there = datetime(2026, 11, 21, 14, tzinfo=timezone(timedelta(hours=2)))
    back = trial_rows(to_table([row_of(TrialConfig(), started_at=there)], TRIALS_SCHEMA))[0].started_at
    assert back is not None
    assert (back, back.tzinfo) == (datetime(2026, 11, 21, 12, tzinfo=UTC), UTC)


@pytest.mark.parametrize("missing", ["ece", "hosts", "mixing_alpha"])
def test_a_column_that_a_table_lacks_is_null(missing: str) -> None:
    table = to_table([row_of(TrialConfig(), hosts="a")], TRIALS_SCHEMA).drop_columns([missing])
    row = trial_rows(table)[0]
    assert {**row.metrics, **row.config, "hosts": row.hosts}[missing] is None


@given(
    st.sets(st.sampled_from(sorted(set(TRIALS_SCHEMA.names) - TRIALS_REQUIRED - {*CONFIG_COLUMNS, *METRIC_COLUMNS})))
)
def test_what_an_earlier_version_did_not_write_is_as_a_new_row_has_it(lacking: set[str]) -> None:
    """Be the column absent, or null all the way as a reader fills it up."""
    written = to_table([row_of(TrialConfig())], TRIALS_SCHEMA).drop_columns(sorted(lacking))
    filled = pa.table(
        {
            name: written.column(name) if name in written.schema.names else pa.nulls(1, TRIALS_SCHEMA.field(name).type)
            for name in TRIALS_SCHEMA.names
        }
    )
    for read in (trial_rows(written)[0], trial_rows(filled)[0]):
        assert read == row_of(TrialConfig())
