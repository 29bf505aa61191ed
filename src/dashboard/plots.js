// Sparklines in SVG, and plots of the last quarter of an hour with uPlot.

"use strict";

const SPARK_SAMPLES = 120;
const SPARK_WIDTH = 100;
const SPARK_HEIGHT = 24;
const PLOT_HEIGHT = 168;
const PLOT_SPAN = 900; // s
const LEAST_PLOT_SPAN = 120; // s: the span of a plot when the page was just opened

// A sparkline of one or more lines. It repeats numbers that stand beside it, so screen readers skip it.
class Sparkline {
  constructor(lines = 1) {
    this.area = makeSvg("path", { class: "spark-area" });
    this.lines = Array.from({ length: lines }, (_, at) =>
      makeSvg("path", { class: `spark-line line-${at}` }),
    );
    this.node = makeSvg(
      "svg",
      {
        class: "spark",
        viewBox: `0 0 ${SPARK_WIDTH} ${SPARK_HEIGHT}`,
        preserveAspectRatio: "none",
        "aria-hidden": "true",
      },
      this.area,
      ...this.lines,
    );
  }

  // Draws lists of values, oldest first; all share one scale from 0 to at least `least`.
  draw(lists, least = 0) {
    let top = least;
    for (const list of lists) for (const value of list) if (value > top) top = value;
    lists.forEach((list, at) => {
      const path = sparkPath(list, top);
      setAttribute(this.lines[at], "d", path.line);
      if (at === 0) setAttribute(this.area, "d", path.area);
    });
  }
}

// The paths of a line and of the area below it; values that are unknown leave a gap.
function sparkPath(values, top) {
  const step = SPARK_WIDTH / (SPARK_SAMPLES - 1);
  const start = SPARK_SAMPLES - values.length;
  const floor = SPARK_HEIGHT - 1;
  let [line, area, open] = ["", "", null];
  const close = () => {
    if (open !== null) area += `L${open.end} ${SPARK_HEIGHT}L${open.start} ${SPARK_HEIGHT}Z`;
    open = null;
  };
  values.forEach((value, at) => {
    if (!Number.isFinite(value)) return close();
    const x = ((start + at) * step).toFixed(1);
    const y = (floor - (top > 0 ? value / top : 0) * (SPARK_HEIGHT - 3)).toFixed(1);
    line += `${open === null ? "M" : "L"}${x} ${y}`;
    area += `${open === null ? "M" : "L"}${x} ${y}`;
    if (open === null) open = { start: x };
    open.end = x;
  });
  close();
  return { line, area };
}

// === plots ===

// The colour that a custom property resolves to in the theme of now.
function themeColor(name) {
  const probe =
    byId("color-probe") ?? document.body.appendChild(make("i", { id: "color-probe", hidden: true }));
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}

function translucent(color, alpha) {
  const parts = color.match(/[\d.]+/g) ?? ["0", "0", "0"];
  return `rgba(${parts.slice(0, 3).join(",")},${alpha})`;
}

// The range of the times: what there is, in bounds.
function plotSpan(_, low, high) {
  return [Math.max(high - PLOT_SPAN, Math.min(low, high - LEAST_PLOT_SPAN)), high];
}

// Times of the axis; seconds stand there only where they differ.
function tickTimes(_, ticks) {
  const isFine = ticks.length > 1 && ticks[1] - ticks[0] < 60;
  return ticks.map((tick) => (isFine ? clock(tick) : clock(tick).slice(0, 5)));
}

// A panel with one plot. `series` are {label, color, dash, value(history, age)}.
class PlotPanel {
  constructor(title, unit, series, options = {}) {
    Object.assign(this, { title, unit, series, options, plot: null });
    this.values = series.map(() => make("b", { class: "num" }));
    const keys = series.map((one, at) =>
      make(
        "span",
        { class: "key" },
        make("i", { class: `swatch${one.dash ? " dashed" : ""} ${one.color.slice(2)}` }),
        make("span", { text: one.label }),
        this.values[at],
      ),
    );
    this.canvas = make("div", { class: "plot-canvas", role: "img" });
    this.node = make(
      "figure",
      { class: "plot" },
      make(
        "figcaption",
        {},
        make("span", { class: "plot-title", text: title }),
        make("span", { class: "keys" }, ...keys),
      ),
      this.canvas,
    );
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.canvas);
  }

  update(history) {
    const { timeline } = history;
    const times = [];
    const columns = this.series.map(() => []);
    for (let age = timeline.length - 1; age >= 0; age -= 1) {
      const time = timeline.times[timeline.at(age)];
      const last = times.at(-1);
      if (last !== undefined && time - last > MAX_SAMPLE_GAP) {
        times.push(last + 1);
        columns.forEach((column) => column.push(null));
      }
      times.push(time);
      this.series.forEach((one, at) => {
        const value = one.value(history, age);
        columns[at].push(Number.isFinite(value) ? value : null);
      });
    }
    this.data = [times, ...columns];
    const now = columns.map((column) => column.at(-1));
    this.hover(this.plot?.cursor.idx);
    const read = this.series.map((one, at) => `${one.label} ${this.unit(now[at])}`).join(", ");
    setAttribute(this.canvas, "aria-label", `${this.title}, the last 15 minutes. Now: ${read}.`);
    if (!this.plot) this.build();
    else this.plot.setData(this.data);
  }

  build() {
    const width = this.canvas.clientWidth;
    if (width === 0 || !this.data) return;
    const [text, line] = [themeColor("--muted"), themeColor("--grid")];
    const font = `11px ${getComputedStyle(document.body).fontFamily}`;
    const axis = { stroke: text, font, grid: { stroke: line, width: 1 }, ticks: { show: false } };
    const series = this.series.map((one) => {
      const color = themeColor(one.color);
      const fill = one.dash || this.options.plain ? undefined : translucent(color, 0.1);
      return {
        stroke: color,
        width: 1.5,
        dash: one.dash,
        fill,
        points: { show: false },
        spanGaps: false,
        label: one.label,
      };
    });
    const { least = 1, most } = this.options;
    const range = (_, low, high) => [0, most ?? Math.max(high ?? 0, least) * 1.1];
    this.plot = new uPlot(
      {
        width,
        height: PLOT_HEIGHT,
        legend: { show: false },
        padding: [10, 6, 0, 0],
        cursor: { drag: { x: false, y: false }, points: { size: 6 } },
        scales: { x: { time: true, range: plotSpan }, y: { range } },
        axes: [
          {
            ...axis,
            size: 24,
            space: 70,
            values: tickTimes,
          },
          { ...axis, size: 54, space: 30, values: (_, ticks) => ticks.map((tick) => this.unit(tick)) },
        ],
        series: [{}, ...series],
        hooks: { setCursor: [(plot) => this.hover(plot.cursor.idx)] },
      },
      this.data,
      this.canvas,
    );
  }

  // Shows the values below the pointer in place of the newest ones.
  hover(index) {
    if (!this.data) return;
    const at = index ?? this.data[0].length - 1;
    this.values.forEach((node, column) => setText(node, this.unit(this.data[column + 1][at])));
  }

  resize() {
    const width = this.canvas.clientWidth;
    if (width === 0) return;
    if (!this.plot) this.build();
    else if (this.plot.width !== width) this.plot.setSize({ width, height: PLOT_HEIGHT });
  }

  // Makes the plot anew, with the colours of another theme.
  recolor() {
    this.plot?.destroy();
    this.plot = null;
    this.build();
  }

  remove() {
    this.observer.disconnect();
    this.plot?.destroy();
    this.plot = null;
    this.node.remove();
  }
}
