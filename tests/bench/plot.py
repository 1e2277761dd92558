"""The plot of the results: bars on a logarithmic scale with the spread of the rounds; other work is hatched."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.bench.harness import Figures
from tests.bench.peers import COMPILED, PYTHON, Peer
from tests.bench.results import Results
from tests.bench.workloads import WORKLOADS

_COLORS = {COMPILED: "black", PYTHON: "dimgrey"}


def draw(results: Results, peers: Sequence[Peer], file: Path) -> None:
    """Write an SVG of what a line costs the server and how many come back."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "echod", "font.size": 9}):
        figure = Figure(figsize=(9, 7), layout="constrained")
        costs, rates = figure.subplots(2, 1)
        _bars(costs, results, peers, lambda each: each.cpu_us)
        _bars(rates, results, peers, lambda each: each.lines_per_s)
        costs.set_title("CPU time of the server for one line, µs: less is better", loc="left")
        rates.set_title("lines a second", loc="left")
        figure.legend(
            *costs.get_legend_handles_labels(), loc="outside upper center", ncols=-(-len(peers) // 2), frameon=False
        )
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})


def _bars(axes: Any, results: Results, peers: Sequence[Peer], of: Callable[[Figures], float]) -> None:
    width = 0.8 / len(peers)
    for number, peer in enumerate(peers):
        shift = (number - (len(peers) - 1) / 2) * width
        found = [
            (place + shift, spread)
            for place, workload in enumerate(WORKLOADS)
            if (spread := results.spread(workload.name, peer.name, of))
        ]
        axes.bar(
            [place for place, _ in found],
            [spread.median for _, spread in found],
            width,
            label=peer.name,
            color=_COLORS.get(peer.name, f"C{number}"),
            hatch="////" if peer.does_other_work else None,
            yerr=[
                [spread.median - spread.least for _, spread in found],
                [spread.most - spread.median for _, spread in found],
            ],
            error_kw={"lw": 0.6, "ecolor": "grey"},
        )
    axes.set_yscale("log")
    axes.set_xticks(range(len(WORKLOADS)), [workload.name for workload in WORKLOADS])
    axes.grid(axis="y", lw=0.3)
    axes.set_axisbelow(True)
