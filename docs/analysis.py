"""Learning curves of a sweep, three times: with pandas, polars and DuckDB. Start from here for figures of your own.

    python docs/analysis.py results quickstart curves.png

The first word is where the results lie, a folder or s3://bucket/prefix; then a sweep, and the picture to write. A sweep
that runs may be drawn too. Needs pandas, polars and duckdb: pip install pandas polars duckdb
"""

import sys

import duckdb
import polars as pl
from matplotlib.figure import Figure

from orchestrator import analysis

CURVES = """
    select t.label, t.mixing_method, e.epoch,
        avg(e.top1) as mean, coalesce(stddev_samp(e.top1), 0) as std, count(e.top1) as n
    from epochs e join trials t using (trial_id, sweep)
    group by all
    having n > 0
    order by all
"""


def with_duckdb(loaded: analysis.Results) -> pl.DataFrame:
    """Mean and deviation over the seeds after each epoch: label, mixing_method, epoch, mean, std, n."""
    trials, epochs = loaded.table, loaded.epochs()
    with duckdb.connect() as connection:
        connection.register("trials", trials)
        connection.register("epochs", epochs)
        return connection.sql(CURVES).pl()


def with_polars(loaded: analysis.Results) -> pl.DataFrame:
    cells = loaded.to_polars().select("sweep", "trial_id", "label", "mixing_method")
    return (
        loaded.to_polars("epochs")
        .drop_nulls("top1")
        .join(cells, on=["sweep", "trial_id"])
        .group_by("label", "mixing_method", "epoch")
        .agg(mean=pl.col("top1").mean(), std=pl.col("top1").std().fill_null(0.0), n=pl.col("top1").count())
        .sort("label", "mixing_method", "epoch", nulls_last=True)
    )


def with_pandas(loaded: analysis.Results) -> pl.DataFrame:
    cells = loaded.to_pandas()[["sweep", "trial_id", "label", "mixing_method"]]
    curves = (
        loaded.to_pandas("epochs")
        .dropna(subset="top1")
        .merge(cells, on=["sweep", "trial_id"])
        .groupby(["label", "mixing_method", "epoch"], dropna=False)
        .top1.agg(mean="mean", std="std", n="count")
        .fillna({"std": 0.0})
        .reset_index()
    )
    return pl.from_pandas(curves)


def draw(curves: pl.DataFrame, title: str) -> Figure:
    """A line for each cell, with a band of one deviation."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for (label, method), curve in curves.group_by("label", "mixing_method", maintain_order=True):
        name = ", ".join(word for word in (label, method) if word) or "all trials"
        (line,) = axes.plot(curve["epoch"], curve["mean"], label=f"{name} (n = {curve['n'].max()})")
        low, high = curve["mean"] - curve["std"], curve["mean"] + curve["std"]
        axes.fill_between(curve["epoch"], low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="epoch", ylabel="top-1 accuracy", title=title)
    axes.legend()
    return figure


def main(place: str, sweep: str, picture: str) -> None:
    loaded = analysis.load(place, sweep)
    draw(with_duckdb(loaded), sweep).savefig(picture, dpi=150)  # with_polars and with_pandas give the same curves
    print(picture)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
