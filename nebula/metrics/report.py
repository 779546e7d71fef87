"""`report.html`: one self-contained page about a run, finished or not."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nebula import files
from nebula.config import Agreement
from nebula.errors import UsageError
from nebula.metrics import events, units
from nebula.metrics.flops import flops_per_token
from nebula.metrics.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#ca8a04", "#0891b2")
"""One per cluster, in order; distinguishable with the common kinds of colour blindness."""


def render(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from run.json, events.jsonl and, where the run has ended, summary.json.
    Raises UsageError if this is no run's folder."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    agreement, history, summary = _load(run_dir)
    environment = Environment(loader=PackageLoader("nebula.metrics", "."), autoescape=True, undefined=StrictUndefined)
    environment.filters.update(size=units.size, loss=units.loss, share=units.share, duration=units.duration)
    page = environment.get_template("report.html.j2").render(
        run=agreement.run.name,
        state=summary.get("state", history.state),
        headline=_headline(history, agreement),
        plots=_plots(history, agreement.unigram_entropy),
        rounds=list(history.rounds.values()),
        clusters=sorted(history.totals),
        evals=history.evals,
        digest=agreement.digest(),
        config=json.dumps(json.loads(agreement.canonical()), indent=2, ensure_ascii=False),
    )
    target = run_dir / "report.html"
    files.write(target, page.encode())
    return target


def _load(run_dir: Path) -> tuple[Agreement, History, dict[str, Any]]:
    history = History()
    hint = "give the folder that `nebula run` named, such as runs/NAME"
    try:
        agreement = Agreement.parse(json.dumps(json.loads((run_dir / "run.json").read_text())["agreement"]).encode())
        log, ended = run_dir / "events.jsonl", run_dir / "summary.json"
        for event in events.read(log) if log.exists() else ():
            history.fold(event)
        summary = json.loads(ended.read_text()) if ended.exists() else {}
        if not isinstance(summary, dict):
            raise TypeError("summary.json is no object")
    except FileNotFoundError as error:
        raise UsageError(f"not a run's folder ({run_dir}): it has no {Path(error.filename).name}", hint=hint) from error
    except (ValueError, KeyError, TypeError) as error:  # pydantic's and json's errors are ValueErrors
        raise UsageError(f"damaged run folder ({run_dir}): {type(error).__name__}", hint=hint) from error
    return agreement, history, summary


def _headline(history: History, agreement: Agreement) -> list[tuple[str, str, str]]:
    """(what, figure, remark) of the boxes at the top."""
    run = agreement.run
    measured = [p.loss for p in history.evals.values() if units.known(p.loss)]
    compute = sum(total.compute_s for total in history.totals.values())
    speed = history.tokens * flops_per_token(run.model, run.data.seq_len) / compute if compute else None
    sent, instead = history.wan_bytes, history.data_parallel_bytes
    change = f"from {units.loss(measured[0])}; " if len(measured) > 1 else ""
    return [
        ("Held-out loss", units.loss(measured[-1] if measured else None), change + _unigram(agreement)),
        ("Rounds", f"{len(history.rounds)} of {run.rounds}", f"{run.inner_steps} inner steps each"),
        ("Tokens", units.amount(history.tokens), f"in {units.duration(history.seconds)}"),
        ("Parameters", units.amount(history.started.get("params")), f"{run.model.layers} layers of {run.model.dim}"),
        (
            "Over the WAN",
            units.size(sent),
            f"{units.times(instead / sent if sent else None)} less than per-step data parallelism in bf16, "
            f"{units.size(instead)}",
        ),
        ("Stalled", units.share(history.stall_share), "of the time of all clusters"),
        ("Compute", f"{units.amount(speed)}FLOP/s" if speed else units.NOTHING, "mean per cluster while it computes"),
    ]


def _unigram(agreement: Agreement) -> str:
    return f"unigram entropy {units.loss(agreement.unigram_entropy)}"


# --- plots --------------------------------------------------------------------------------------------------------


def _plots(history: History, unigram: float) -> list[tuple[str, str]]:
    """(title, data: URI) for each figure that has data."""
    if not history.rounds and not history.evals:
        return []
    plots = [("Loss", _embed(_loss_figure(history, unigram)))]
    if history.rounds:
        plots.append(("Bytes per round", _embed(_bytes_figure(history))))
        plots.append(("Where the time went", _embed(_time_figure(history))))
    return plots


def _embed(figure: Figure) -> str:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "nebula"}):  # the same run gives the same bytes
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _figure(columns: int, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, height), layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
    return figure, axes


def _loss_figure(history: History, unigram: float) -> Figure:
    from matplotlib.ticker import EngFormatter

    figure, axes = _figure(3, 3.4)
    rounds, evals = list(history.rounds.values()), list(history.evals.values())
    marker = "o" if len(rounds) == 1 else None
    for axis, name, label in zip(
        axes, ("tokens", "seconds", "wan_bytes"), ("tokens", "seconds", "bytes over the WAN"), strict=True
    ):
        axis.plot(*_finite_xy(rounds, name), color=COLOURS[0], marker=marker, label="training, mean of a round")
        axis.plot(*_finite_xy(evals, name), "o--", color=COLOURS[1], label="held out, global model", linewidth=1)
        axis.axhline(unigram, color="#6b7280", linestyle=":", label="unigram entropy")
        axis.set_xlabel(label)
        axis.xaxis.set_major_formatter(EngFormatter(places=None))
    axes[0].set_ylabel("loss (nats per token)")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def _finite_xy(points: list[Any], name: str) -> tuple[list[float], list[float]]:
    kept = [p for p in points if units.known(p.loss)]
    return [getattr(p, name) for p in kept], [p.loss for p in kept]


def _bytes_figure(history: History) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(2, 2.8)
    names = sorted(history.totals)
    width = 0.8 / len(names)
    for axis, field, label in zip(axes, ("up_bytes", "down_bytes"), ("up", "down"), strict=True):
        for place, name in enumerate(names):
            points = [
                (r.round + 1, getattr(r.clusters[name], field)) for r in history.rounds.values() if name in r.clusters
            ]
            x = [number + (place - (len(names) - 1) / 2) * width for number, _ in points]
            axis.bar(x, [y / 1e6 for _, y in points], width, color=COLOURS[place % len(COLOURS)], label=name)
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("round")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("MB")
    _legend_beside(axes[-1])
    return figure


def _time_figure(history: History) -> Figure:
    names = sorted(history.totals, reverse=True)
    figure, (axis,) = _figure(1, 1.2 + 0.4 * len(names))
    compute = [history.totals[name].compute_s for name in names]
    axis.barh(names, compute, 0.6, color=COLOURS[2], label="compute")
    axis.barh(names, [history.totals[n].stall_s for n in names], 0.6, left=compute, color=COLOURS[1], label="stalled")
    axis.set_xlabel("seconds")
    _legend_beside(axis)
    return figure


def _legend_beside(axis: Axes) -> None:
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
