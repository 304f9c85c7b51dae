"""What the benchmarks share: the machine in words, a table, JSON and a plot."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path


def machine() -> dict:
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in ("segnn-ase", "torch", "numpy")},
    }


def print_table(rows: list[dict], columns: dict[str, str]) -> None:
    """columns: {key of a row: format}."""
    widths = {key: max(len(key), *(len(_cell(row, key, form)) for row in rows)) for key, form in columns.items()}
    print("  ".join(key.rjust(width) for key, width in widths.items()))
    for row in rows:
        print("  ".join(_cell(row, key, columns[key]).rjust(width) for key, width in widths.items()))


def _cell(row: dict, key: str, form: str) -> str:
    value = row.get(key)
    return "-" if value is None else format(value, form)


def save(out: str, rows: list[dict], settings: dict) -> None:
    Path(f"{out}.json").write_text(json.dumps({"machine": machine(), "settings": settings, "rows": rows}, indent=1))
    print(f"wrote {out}.json")


def plot_lines(out: str, rows: list[dict], *, group: str, x: str, y: str, labels: tuple[str, str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in dict.fromkeys(row[group] for row in rows):
        points = [(row[x], row[y]) for row in rows if row[group] == name and row.get(y) is not None]
        axes.loglog(*zip(*points, strict=True), "o-", label=name)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.legend()
    figure.savefig(f"{out}.png", dpi=150)
    plt.close(figure)
