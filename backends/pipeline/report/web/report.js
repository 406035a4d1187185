"use strict";
// Charts, by uPlot: a line's values at the pointer, or at the arrow keys; its button hides it; the axis may be logarithmic.

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const UNITS = [[1e9, "G"], [1e6, "M"], [1e3, "k"]];

// Whether a value is 1, 2 or 5 times a power of ten, as labels of a logarithmic axis are.
const round = (value) => [1, 2, 5, 10].some((first) => Math.abs(value / 10 ** Math.floor(Math.log10(value)) - first) < 1e-6);

function number(value, images) {
  if (value == null) return "–";
  const unit = images && UNITS.find(([size]) => Math.abs(value) >= size);
  return unit ? `${+(value / unit[0]).toPrecision(4)}${unit[1]}` : String(+value.toPrecision(4));
}

class LineChart {
  constructor(figure) {
    this.chart = JSON.parse(figure.querySelector("script").textContent);
    this.target = figure.querySelector(".plot");
    this.legend = figure.querySelector(".legend");
    this.log = this.chart.y_log;
    this.hidden = new Set();
    const positive = this.chart.lines.every((line) => line.points[1].every((y) => y == null || y > 0));
    const button = figure.querySelector(".log");
    button.hidden = !positive;
    button.setAttribute("aria-pressed", this.log);
    button.addEventListener("click", () => {
      this.log = !this.log;
      button.setAttribute("aria-pressed", this.log);
      this.draw();
    });
    this.buttons = this.chart.lines.map((line, i) => this.button(line, i));
    this.target.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(this.target);
  }

  button(line, i) {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    const mark = document.createElement("i");
    mark.style.borderTop = `3px ${line.dashed ? "dashed" : "solid"} ${line.colour}`;
    button.append(mark, line.label, document.createElement("span"));
    button.addEventListener("click", () => {
      if (!this.hidden.delete(i)) this.hidden.add(i);
      button.setAttribute("aria-pressed", !this.hidden.has(i));
      this.draw();
    });
    this.legend.append(button);
    return button;
  }

  draw() {
    if (this.width === this.target.clientWidth && this.drawn === this.state()) return;
    [this.width, this.drawn] = [this.target.clientWidth, this.state()];
    this.plot?.destroy();
    const { lines, images } = this.chart;
    const masked = (values) => values.map((y) => (this.log && !(y > 0) ? null : y));
    const data = uPlot.join(lines.map(({ points: [x, ...ys] }) => [x, ...ys.map(masked)]));
    const series = [{}], bands = [];
    this.columns = lines.map(({ points, colour, dashed, marked }, i) => {
      const column = series.length, show = !this.hidden.has(i);
      const dots = { show: marked || points[0].length === 1, size: 5 };
      series.push({ stroke: colour, width: 1.5, dash: dashed ? [6, 4] : [], show, spanGaps: true, points: dots });
      if (points.length > 2) {
        const edge = { stroke: "transparent", show, spanGaps: true, points: { show: false } };
        series.push(edge, edge);
        bands.push({ series: [column + 2, column + 1], fill: `${colour}33` });
      }
      return column;
    });
    const axis = (label, whole, log) => ({
      label, labelSize: 18, labelFont: "12px system-ui", font: "12px system-ui", stroke: style("--dim"), size: whole ? 34 : 58,
      grid: { stroke: style("--line"), width: 1 }, ticks: { show: false },
      values: (_, splits) => splits.map((value) => (value == null || (log && !round(value)) ? "" : number(value, whole && images))),
    });
    const { x_log, x_end, y_span } = this.chart;
    this.plot = new uPlot({
      width: this.width, height: 260, legend: { show: false }, series, bands,
      axes: [axis(this.chart.x, true, this.chart.x_log), axis(this.chart.y || null, false, this.log)],
      scales: {
        x: { time: false, distr: x_log ? 3 : 1, range: x_end ? [0, x_end] : (_, low, high) => [low, high] },
        y: { distr: this.log ? 3 : 1, ...(y_span && this.log ? { range: y_span } : {}) },
      },
      cursor: { y: false, drag: { x: true, y: false }, ...(images ? { sync: { key: "images" } } : {}) },
      hooks: { setCursor: [(plot) => this.say(plot)] },
    }, data, this.target);
    this.say(this.plot);
  }

  state() {
    return `${this.log} ${[...this.hidden]} ${style("--dim")}`;
  }

  say(plot) {
    const at = plot.cursor.idx;
    this.buttons.forEach((button, i) => {
      const values = plot.data[this.columns[i]];
      let near = at;
      for (let step = 0; at != null && values[near] == null && step < values.length; step++)
        near = step % 2 ? at + (step + 1) / 2 : at - step / 2;
      button.lastChild.textContent = at == null ? "" : number(values[near]);
    });
    const x = at == null ? "" : `${this.chart.x}: ${number(plot.data[0][at], this.chart.images)}`;
    this.target.dataset.at = x;
  }

  key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const last = this.plot.data[0].length - 1;
    const index = Math.min(Math.max((this.plot.cursor.idx ?? (step > 0 ? -1 : last + 1)) + step, 0), last);
    this.plot.setCursor({ left: this.plot.valToPos(this.plot.data[0][index], "x"), top: 0 });
  }
}

const drawn = [...document.querySelectorAll("figure.lines")].map((figure) => new LineChart(figure));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach((chart) => chart.draw()));

// ---- the slider over lengths of averages

const slider = document.getElementById("length");
if (slider) {
  const lengths = [...document.querySelectorAll(".ticks span")].map((tick) => tick.textContent);
  const show = () => {
    const length = lengths[slider.value];
    for (const strip of document.querySelectorAll("[data-length]")) strip.hidden = strip.dataset.length !== length;
    document.querySelector(".slider output").value = length;
    slider.setAttribute("aria-valuetext", length);
  };
  slider.addEventListener("input", show);
  show();
}
