#!/usr/bin/env python3
"""Draws docs/images/policies.svg from the tables in benches/results/simulate.md.

    docs/plot.py            writes the picture
    docs/plot.py --check    ends with 1 when the committed picture is another one

A row is the mean time to the first token of one policy.
"""

import math
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
TABLES = ROOT / "benches/results/simulate.md"
PICTURE = ROOT / "docs/images/policies.svg"

# The command of each table that is drawn, and its caption.
CHARTS = (
    ("--trace conversation_trace.jsonl --upstreams 16", "conversation trace, 16 engines"),
    ("--shape agents --upstreams 12 --seed 1", "coding agents, 12 engines (logarithmic)"),
    ("--shape rag --rate 1", "questions to documents, 8 engines (logarithmic)"),
)

# Above this ratio of the largest mean to the smallest one a chart has a logarithmic scale.
MAX_LINEAR_RATIO = 10

LEFT, RIGHT, WIDTH, ROW, TOP = 150, 790, 860, 18, 44

STYLE = """
    .page { fill: #ffffff; } .grid { stroke: #d1d9e0; } .bar { fill: #8c959f; } .work { fill: #0969da; }
    text { fill: #1f2328; } .small { fill: #57606a; }
    @media (prefers-color-scheme: dark) {
      .page { fill: #0d1117; } .grid { stroke: #30363d; } .bar { fill: #6e7681; } .work { fill: #4493f8; }
      text { fill: #e6edf3; } .small { fill: #8d96a0; }
    }
"""


def means(command):
    """The policies of a table and their mean times to the first token, as they are printed, in its order."""
    text = TABLES.read_text()
    found = re.search(rf"^\$ vllm-lb simulate {re.escape(command)}\n.*\n((?:.+\n)+?)```", text, re.MULTILINE)
    if found is None:
        raise SystemExit(f"no table of `vllm-lb simulate {command}` in {TABLES}")
    rows = [line.split() for line in found[1].splitlines()]
    return [(row[0], row[2]) for row in rows]


def linear(values):
    """Positions from 0 to 1 on a scale that begins at zero, and the marks of the scale."""
    high = math.ceil(max(values))
    return (lambda value: value / high), [high * part / 4 for part in range(5)]


def logarithmic(values):
    """The same on a scale of powers of ten."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return (lambda value: (math.log10(value) - low) / (high - low)), [10.0**at for at in range(low, high + 1)]


def chart(caption, rows, top, unit="s", ours="work", left=LEFT):
    """One group of rows, and the line at which it ends. Bars show lengths: a logarithmic scale gets dots.

    `ours` is the row that stands out; `left` is where the scale begins, right of the labels.
    """
    values = [float(mean) for _, mean in rows]
    is_linear = max(values) <= MAX_LINEAR_RATIO * min(values)
    share, marks = (linear if is_linear else logarithmic)(values)

    def x(value):
        return left + (RIGHT - left) * share(value)

    bottom = top + 10 + ROW * len(rows)
    parts = [f'<text x="{left}" y="{top}" font-weight="600">{caption}</text>']
    for mark in marks:
        at = f"{x(mark):.1f}"
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{top + 8}" y2="{bottom}"/>')
        below = f'x="{at}" y="{bottom + 14}" text-anchor="middle"'
        parts.append(f'<text class="small" {below}>{mark:g} {unit}</text>')
    for number, (policy, mean) in enumerate(rows):
        at = x(float(mean))
        y = top + 10 + ROW * number
        kind = "work" if policy == ours else "bar"
        parts.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{policy}</text>')
        if is_linear:
            bar = f'x="{left}" y="{y + 2}" width="{at - left:.1f}" height="{ROW - 5}"'
            parts.append(f'<rect class="{kind}" {bar}/>')
        else:
            parts.append(f'<circle class="{kind}" cx="{at:.1f}" cy="{y + 8}" r="5"/>')
        parts.append(f'<text class="small" x="{at + 9:.1f}" y="{y + 12}">{mean} {unit}</text>')
    return parts, bottom + 44


def page(title, subtitle, charts, source=""):
    """A picture of charts, one below the other; a chart is what `chart` takes without its position.

    `source` says below them where the figures come from.
    """
    parts, top = [], TOP
    for caption, rows, *more in charts:
        bars, top = chart(caption, rows, top, *more)
        parts += bars
    height = top - 20
    if source:
        parts.append(f'<text class="small" x="16" y="{top - 8}">{source}</text>')
        height = top + 6
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}"',
        f'  height="{height}" role="img" aria-labelledby="title" font-size="12"',
        "  font-family=\"system-ui, -apple-system, 'Segoe UI', sans-serif\">",
        f'<title id="title">{title}</title>',
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}" rx="8"/>',
        '<text class="small" x="16" y="20">',
        f"{subtitle}</text>",
    ]
    return "\n".join([*head, *parts, "</svg>"]) + "\n"


def picture():
    return page(
        "Mean time to the first token of each policy, in seconds",
        "Mean time to the first token in seconds, less is better",
        [(caption, means(command)) for command, caption in CHARTS],
    )


def main(arguments):
    drawn = picture()
    if arguments == ["--check"]:
        return PICTURE.read_text() != drawn
    if arguments:
        sys.exit(__doc__)
    PICTURE.write_text(drawn)
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
