"""Which run is better, and is the difference larger than that between seeds? A second.

    python experiments/compare.py out/quality
    python experiments/compare.py out/recall/rat* --value=accuracy --plot=recall.svg

A table of a value over the steps, by default the validation loss, of all runs in the folders. Runs in NAME/1,
NAME/2 and so on make one line: the mean, and at the end the standard deviation. --plot draws it (pip install
matplotlib).
"""

import argparse
import itertools
import json
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root
from prepare_data import parse, run


def read_runs(folders, value):
    """{name: [{step: record}, ...]}: for each name a run for each seed, of records that have the value."""
    runs = {}
    for folder in folders:
        if not Path(folder).is_dir():
            raise ValueError(f"there is no folder {folder}")
    for path in sorted({log for folder in folders for log in Path(folder).rglob("log.jsonl")}):
        name = path.parent.parent if path.parent.name.isdecimal() else path.parent
        records = [json.loads(line) for line in path.read_text().splitlines()]
        records = {record["step"]: record for record in records if value in record}
        if records:
            runs.setdefault(str(name), []).append(records)
    if not runs:
        raise ValueError(f"no log.jsonl in {', '.join(folders)} has a {value}")
    return runs


def table(runs, value):
    """Prints the table. Returns {name: (millions of tokens, means)}."""
    steps = sorted({step for seeds in runs.values() for records in seeds for step in records})
    columns = steps[max(0, len(steps) // 8 - 1) : -1 : max(1, len(steps) // 8)]
    width = max(map(len, [value, *runs]))
    header = "".join(f"{step:>8}" for step in columns)
    print(f"{value:<{width}}{header}{'end':>16}{'tokens/s':>10}{'runs':>6}")
    lines = {}
    for name, seeds in runs.items():
        shared = [step for step in steps if all(step in records for records in seeds)]
        if not shared:
            continue
        means = {step: statistics.mean(records[step][value] for records in seeds) for step in shared}
        ends = [records[shared[-1]] for records in seeds]
        spread = f" ± {statistics.stdev(end[value] for end in ends):.3f}" if len(ends) > 1 else ""
        cells = "".join(f"{means[step]:>8.3f}" if step in means else " " * 8 for step in columns)
        rate = statistics.median(record["tokens_per_second"] for run in seeds for record in run.values())
        print(f"{name:<{width}}{cells}{means[shared[-1]]:>8.3f}{spread:<8}{rate:>10,.0f}{len(ends):>6}")
        lines[name] = [seeds[0][step]["tokens"] / 1e6 for step in shared], list(means.values())
    return lines


def plot(lines, value, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "the same file each time"
    figure, axes = pyplot.subplots(figsize=(6, 4.5), layout="constrained")
    folder = os.path.join(os.path.commonpath([os.path.dirname(name) for name in lines]), "")
    for (name, points), marker in zip(lines.items(), itertools.cycle("os^Dv<>Xp")):
        axes.plot(*points, marker=marker, markersize=5, label=name.removeprefix(folder))
    axes.set(xlabel="million tokens", ylabel=value.replace("_", " "))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncol=3, frameon=False)
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.endswith(".svg") else {})


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("folders", nargs="+", help="of runs, such as out")
    parser.add_argument("--value", default="val_loss", help="what to compare, of log.jsonl [val_loss]")
    parser.add_argument("--plot", help="file for a picture, .svg or .png")
    args = parse(parser)
    lines = table(read_runs(args.folders, args.value), args.value)
    if args.plot:
        plot(lines, args.value, args.plot)


if __name__ == "__main__":
    run(main)
