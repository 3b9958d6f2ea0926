"""The pictures of the README files. Seconds; pip install matplotlib.

    python experiments/pictures.py                       what each kind sees, and how RAT computes an output
    python bench.py --lengths=1024,2048,4096,8192,16384 --json=bench.json
    python experiments/pictures.py bench.json            the time of a step against the length
    python experiments/pictures.py topk.json             what topk.py measured

compare.py --plot draws the curves.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot, ticker
from matplotlib.patches import FancyBboxPatch, Rectangle

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root
from prepare_data import run
from rat import Config

BLUE, ORANGE, LIGHT, GREY, GREEN = "#1b4f8a", "#c8551c", "#f6c9a4", "#e4e4e4", "#2f9e44"
STYLE = {"font.size": 12, "svg.hashsalt": "the same file each time"}


def save(figure, path):
    figure.savefig(path, bbox_inches="tight", facecolor="white", metadata={"Date": None})
    print(path)


def visibility(path):
    """Keys against queries, for each kind, from Kind.visible."""
    T = 12
    titles = {
        "attention": "attention",
        "swa:3": "sliding window",
        "rnn": "gated linear RNN",
        "rat:4": "RAT",
        "rat+": "RAT+, dense",
        "rat+:4:2:1": "RAT+, sparse",
    }
    figure, panels = pyplot.subplots(2, 3, figsize=(7, 6.2), layout="constrained")
    for axes, (name, title) in zip(panels.flat, titles.items()):
        kind = Config(layers=name).kind(0)
        axes.add_patch(Rectangle((-0.5, -0.5), T, T, color=GREY))
        cells = []
        for i in range(T):
            seen = {j for j in range(T) if kind.visible(i, j)}
            summed = {t for j in seen for t in range(j - j % (kind.restart or 1), j)} - seen
            cells += [(j, i, ORANGE if kind.restart else BLUE) for j in seen]
            cells += [(j, i, LIGHT) for j in summed]
        keys, queries, colors = zip(*cells)
        axes.scatter(keys, queries, marker="s", s=130, color=colors, edgecolor="white")
        axes.add_patch(Rectangle((-0.5, 9.5), T, 1, fill=False, linewidth=1.5))
        axes.set(xlim=(-0.6, T - 0.4), ylim=(T - 0.4, -0.6), aspect="equal")
        axes.set(xticks=[0, 4, 8], yticks=[0, 4, 8])
        axes.tick_params(length=0, labelsize=10, pad=1)
        axes.spines[:].set_visible(False)
        axes.set_title(title, y=1.07)
        axes.text(T / 2 - 0.5, -0.9, name, ha="center", family="monospace", fontsize=11)
    panels[1, 0].set(xlabel="key →", ylabel="← query")
    meaning = {
        BLUE: "token the query sees",
        ORANGE: "state the query sees",
        LIGHT: "token summarized in a state",
        GREY: "not visible",
    }
    squares = [Rectangle((0, 0), 1, 1, color=color) for color in meaning]
    legend = dict(loc="outside lower center", ncol=2, frameon=False, handlelength=1)
    figure.legend(squares, meaning.values(), **legend)
    save(figure, path)


def output(path):
    """How the output of token 10 comes about, in the four lines of rat.py, with token 5's part in it."""
    T, L, i = 12, 4, 10
    kind = Config(layers=f"rat:{L}").kind(0)
    figure, axes = pyplot.subplots(figsize=(8, 8.6))
    figure.subplots_adjust(0, 0, 1, 1)
    axes.set(xlim=(-0.1, T + 0.1), ylim=(-4.6, 8.3))
    axes.axis("off")

    def box(x, y, width, text, color, ink="white"):
        axes.add_patch(FancyBboxPatch((x, y), width, 0.7, "round,pad=0,rounding_size=0.12", color=color))
        axes.text(x + width / 2, y + 0.32, text, ha="center", va="center", color=ink, fontsize=14)

    def arrow(*points, color):
        axes.plot(*zip(*points), color=color, linewidth=3 if color == GREEN else 1.6)
        style = dict(arrowstyle="-|>", color=color, shrinkA=0, shrinkB=0)
        axes.annotate("", points[-1], points[-2], arrowprops=style)

    def step(n, x, y, text):
        row = -0.6 - 0.75 * n
        for place in (x, y), (0.25, row):
            circle = dict(boxstyle="circle,pad=0.2", color="black")
            axes.text(*place, n, ha="center", va="center", color="white", fontsize=11, bbox=circle)
        axes.text(0.65, row, text, va="center", fontsize=14)

    for first in range(0, T, L):
        axes.add_patch(Rectangle((first + 0.03, -0.15), L - 0.06, 3, color="#f6f6f6"))
        axes.text(first + L / 2, -0.5, f"chunk {first // L}", ha="center", va="center", fontsize=14)
    for t in range(T):
        seen, color = kind.visible(i, t), ORANGE if t <= i else "#999999"
        fill, ink = (ORANGE, "white") if seen else (LIGHT if t < i else GREY, "black")
        box(t + 0.12, 1.9, 0.76, f"$h_{{{t}}}$", fill, ink)
        fill, ink = (BLUE, "white") if t == i else (GREY, "black")
        box(t + 0.12, 0, 0.76, f"$x_{{{t}}}$", fill, ink)
        arrow((t + 0.5, 0.7), (t + 0.5, 1.9), color=GREEN if t == 5 else color)
        if t % L:
            arrow((t - 0.12, 2.25), (t + 0.12, 2.25), color=GREEN if t in (6, 7) else color)
        if seen:
            arrow((t + 0.5, 2.6), (t + 0.5, 4.5), color=GREEN if t == 7 else color)
            axes.text(t + 0.4, 3.2, rf"$\tilde k_{{{t}}}, \tilde v_{{{t}}}$", ha="right", fontsize=13)
            arrow((t + 0.1, 3.9), (t + 0.1, 4.5), color=BLUE)
            box(t - 0.35, 4.5, 1.7, rf"$q_{{{i}}} \cdot \tilde k_{{{t}}}$", ORANGE)
            arrow((t + 0.5, 5.2), (t + 0.5, 5.9), color=GREEN if t == 7 else color)
    box(2.65, 5.9, 8.7, r"$y_{10} = w_3\, \tilde v_3 + w_7\, \tilde v_7 + w_{10}\, \tilde v_{10}$", ORANGE)
    arrow((7, 6.6), (7, 7.3), color=GREEN)
    box(5.5, 7.3, 3, "output 10", ORANGE)
    axes.plot((11, 3.1), (3.9, 3.9), color=BLUE, linewidth=1.6)
    arrow((10.88, 0.35), (11, 0.35), (11, 3.9), (11.7, 3.9), (11.7, 7.65), (8.5, 7.65), color=BLUE)
    axes.text(5, 4, r"$q_{10}$", color=BLUE, fontsize=14)
    axes.text(10, 7.8, r"$z_{10}$", color=BLUE, fontsize=14)
    step(1, 0.25, 1.3, r"$z, v, g, q, k$ = in_proj($x$), for each token")
    recurrence = r"$h_t = f_t\, h_{t-1} + (1 - f_t)\, (k_t, v_t)$"
    step(2, 0.25, 3.15, recurrence + r", from zero in each chunk; $h = (\tilde k, \tilde v)$")
    scores = r"rope$(q_{10}) \cdot$ rope$(\tilde k_j)\, /\, \sqrt{D}$"
    step(3, 2.3, 6.25, rf"weights $w$ = softmax of {scores}")
    step(4, 5.1, 7.65, r"out_proj$(\sigma(z_{10}) \cdot y_{10})$")
    axes.text(0.05, -4.35, "in green: how token 5 reaches output 10", color=GREEN, va="center", fontsize=14)
    save(figure, path)


def speed(path, results):
    """Milliseconds against T, of a training step and of a decoding step; results: of bench.py."""
    figure, panels = pyplot.subplots(1, 2, figsize=(7.5, 4.3), layout="constrained")
    titles = {"train": "one training step", "decode": "one decoding step"}
    names = dict.fromkeys(row["name"] for row in results)
    for axes, (mode, title) in zip(panels, titles.items()):
        rows = [row for row in results if row["mode"] == mode and "ms" in row]
        for name, marker in zip(names, itertools.cycle("os^Dv<>Xp")):
            points = [(row["T"], row["ms"]) for row in rows if row["name"] == name]
            axes.plot([T for T, _ in points], [ms for _, ms in points], marker=marker, label=name)
        axes.set(xscale="log", yscale="log", title=title)
        axes.set(xlabel="sequence length T (tokens)", ylabel="milliseconds")
        lengths = sorted({row["T"] for row in rows})
        axes.set_xticks(lengths, [f"{T / 1024:g}K" for T in lengths])
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncol=5, frameon=False)
    save(figure, path)


def topk(path, results):
    """How much the loss rises, by keys and by kB read, a column for each model; results: of topk.py."""
    names, rules, sizes = (list(dict.fromkeys(row[x] for row in results)) for x in ("name", "rule", "size"))
    shape = dict(figsize=(2.3 * len(names), 6.5), layout="constrained")
    figure, panels = pyplot.subplots(2, len(names), sharey=True, squeeze=False, **shape)
    for (name, rule, size), rows in itertools.groupby(results, lambda x: (x["name"], x["rule"], x["size"])):
        rows = list(rows)
        style = dict(color=f"C{rules.index(rule)}", marker="os^"[sizes.index(size) % 3], markersize=5)
        style |= dict(linestyle=["-", ":", "--"][sizes.index(size) % 3], label=f"{rule}, {size}")
        for axes, cost in zip(panels[:, names.index(name)], ("keys", "kB")):
            axes.plot([row[cost] for row in rows], [row["rise"] for row in rows], **style)
            axes.set_xlabel(f"{cost} read")
    for column, name in zip(panels.T, names):
        column[0].set_title(Path(name).name)
    for axes in panels.flat:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", nonpositive="mask")
        axes.set_ylim(bottom=1e-3)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    for axes in panels[:, 0]:
        axes.set_ylabel("rise of the loss")
    labels = axes.get_legend_handles_labels()
    figure.legend(*labels, loc="outside lower center", ncol=len(rules), frameon=False)
    save(figure, path)


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("json", nargs="?", help="what bench.py or topk.py wrote")
    parser.add_argument("--out", type=Path, default=Path("experiments/pictures"), help="folder for them")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with pyplot.rc_context(STYLE):
        if args.json is None:
            visibility(args.out / "visibility.svg")
            output(args.out / "output.svg")
            return
        results = json.loads(Path(args.json).read_text())["results"]
        if "rule" in results[0]:
            topk(args.out / "topk.svg", results)
        else:
            speed(args.out / "speed.svg", results)


if __name__ == "__main__":
    run(main)
