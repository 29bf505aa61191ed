// Elements and texts: everything that comes from the server is set as text, never as HTML.

"use strict";

const SVG = "http://www.w3.org/2000/svg";
const UNKNOWN = "–";

const byId = (id) => document.getElementById(id);

// Makes an element. Attributes with a function are listeners; `class`, `text` and `data` are what they say.
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") node.textContent = value;
    else if (name === "data") Object.assign(node.dataset, value);
    else if (typeof value === "function") node.addEventListener(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function makeSvg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// A symbol of the page; it repeats a word beside it, so screen readers skip it.
function icon(name) {
  return makeSvg("svg", { "aria-hidden": "true", class: "glyph" }, makeSvg("use", { href: `#i-${name}` }));
}

function setIcon(node, name) {
  if (node.shownIcon === name) return;
  node.shownIcon = name;
  node.firstChild.setAttribute("href", `#i-${name}`);
}

// Sets the text of an element that has no other children, if it differs from what was set before.
function setText(node, text) {
  if (node.shownText === text) return;
  node.shownText = text;
  node.textContent = text;
}

function setAttribute(node, name, value) {
  if (value === null || value === undefined) {
    if (node.hasAttribute(name)) node.removeAttribute(name);
  } else if (node.getAttribute(name) !== String(value)) {
    node.setAttribute(name, value);
  }
}

function setHidden(node, hidden) {
  if (node.hidden !== hidden) node.hidden = hidden;
}

// Makes the children of a list those of `keys`, in this order; a child that stays is kept.
function reconcile(parent, rows, keys, create) {
  const wanted = new Set(keys);
  for (const [key, row] of rows) {
    if (wanted.has(key)) continue;
    row.node.remove();
    row.removed?.();
    rows.delete(key);
  }
  let next = parent.firstElementChild;
  for (const key of keys) {
    let row = rows.get(key);
    if (!row) {
      row = create(key);
      rows.set(key, row);
    }
    if (row.node === next) next = next.nextElementSibling;
    else parent.insertBefore(row.node, next);
  }
}

// === numbers as text ===

const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

// A number of at most four digits and a unit: 0.3, 7.2, 480, 12.4k.
function compact(value) {
  if (!isNumber(value)) return UNKNOWN;
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 0.05) return "<0.1";
  if (size < 10) return Number.isInteger(value) ? String(value) : value.toFixed(1);
  if (size < 1000) return value.toFixed(0);
  for (const [unit, scale] of [
    ["k", 1e3],
    ["M", 1e6],
    ["G", 1e9],
    ["T", 1e12],
  ]) {
    const scaled = value / scale;
    if (Math.abs(scaled) < 999.5) return `${scaled.toFixed(Math.abs(scaled) < 99.95 ? 1 : 0)}${unit}`;
  }
  return value.toExponential(1);
}

const count = (value) => (isNumber(value) ? grouped.format(value) : UNKNOWN);

function percent(share) {
  if (!isNumber(share)) return UNKNOWN;
  const value = share * 100;
  return `${value > 0 && value < 9.95 ? value.toFixed(1) : value.toFixed(0)} %`;
}

function milliseconds(value) {
  if (!isNumber(value)) return UNKNOWN;
  if (value === 0) return "0 ms";
  if (value < 10) return `${value.toFixed(1)} ms`;
  if (value < 999.5) return `${value.toFixed(0)} ms`;
  if (value < 60000) return `${(value / 1000).toFixed(value < 10000 ? 2 : 1)} s`;
  return duration(value / 1000);
}

function bytes(value) {
  if (!isNumber(value)) return UNKNOWN;
  for (const [unit, scale] of [
    ["B", 1],
    ["KiB", 2 ** 10],
    ["MiB", 2 ** 20],
    ["GiB", 2 ** 30],
  ]) {
    const scaled = value / scale;
    if (scaled < 1024 || unit === "GiB") {
      return `${scaled < 10 && scale > 1 ? scaled.toFixed(1) : scaled.toFixed(0)} ${unit}`;
    }
  }
  return UNKNOWN;
}

function duration(seconds) {
  if (!isNumber(seconds)) return UNKNOWN;
  const [s, m, h] = [Math.floor(seconds), Math.floor(seconds / 60), Math.floor(seconds / 3600)];
  if (s < 60) return `${s} s`;
  if (m < 60) return `${m} min ${s % 60} s`;
  if (h < 48) return `${h} h ${m % 60} min`;
  return `${Math.floor(h / 24)} d ${h % 24} h`;
}

const clockFormat = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });
const dateFormat = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "medium" });
const clock = (seconds) => (isNumber(seconds) ? clockFormat.format(seconds * 1000) : UNKNOWN);
const date = (seconds) => (isNumber(seconds) ? dateFormat.format(seconds * 1000) : UNKNOWN);
const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;
const text = (value) => (value === null || value === undefined || value === "" ? UNKNOWN : String(value));

// === parts that several views have ===

// A definition list of facts, updated in place: `show({label: text})`.
function factList() {
  const node = make("dl", { class: "facts" });
  const values = new Map();
  const show = (facts) => {
    for (const [label, value] of Object.entries(facts)) {
      let shown = values.get(label);
      if (!shown) {
        shown = make("dd");
        values.set(label, shown);
        node.append(make("div", {}, make("dt", { text: label }), shown));
      }
      setText(shown, text(value));
    }
  };
  return { node, show };
}

// A table whose rows are kept: `columns` are [title, class]; `show(items, key, cells)` sets the texts.
function plainTable(caption, columns) {
  const body = make("tbody");
  const heads = columns.map(([title, kind]) => make("th", { scope: "col", class: kind, text: title }));
  const head = make("thead", {}, make("tr", {}, ...heads));
  const table = make(
    "table",
    { class: "plain" },
    make("caption", { class: "hidden", text: caption }),
    head,
    body,
  );
  const node = make("div", { class: "scroll", role: "region", "aria-label": caption, tabindex: "0" }, table);
  const rows = new Map();
  const create = () => {
    const cells = columns.map(([, kind], at) =>
      at === 0 ? make("th", { scope: "row", class: kind }) : make("td", { class: kind }),
    );
    return { node: make("tr", {}, ...cells), cells };
  };
  const show = (items, key, texts) => {
    const found = new Map(items.map((item) => [key(item), item]));
    reconcile(body, rows, [...found.keys()], create);
    for (const [name, item] of found) {
      const { cells } = rows.get(name);
      texts(item).forEach((value, at) => fill(cells[at], value));
    }
  };
  return { node, show };
}

// Fills a cell with a text, or with an element of the kind that a function makes once.
function fill(cell, value) {
  if (typeof value === "function") value(cell);
  else setText(cell, text(value));
}

const panel = (title, id, ...content) =>
  make(
    "div",
    { class: "panel" },
    make("div", { class: "panel-head" }, make("h2", { id, text: title })),
    ...content,
  );
