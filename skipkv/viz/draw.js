// Small helpers: elements, numbers, colours of the theme, canvases over the positions of the text.

const byId = (id) => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// An element that a screen reader takes for a picture.
function picture(tag, label, properties) {
  return Object.assign(make(tag, properties), { role: "img", ariaLabel: label });
}

// The page's title, what it shows, and of which run.
function introduce(title, text, run) {
  byId("title").textContent = title;
  byId("about").replaceChildren(text, make("small", { textContent: run }));
}

// Shows the page's data, again when the theme changes; the view is there for whoever looks from outside.
function start(View) {
  const show = (data) => {
    window.view = new View(data);
    view.draw();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => view.draw());
  };
  unpack(byId("data").textContent).then(show, (error) => (byId("about").textContent = "This browser cannot read the page's data: " + error));
}

const plural = (n, word) => number(n) + " " + word + (n === 1 ? "" : "s");
const number = (x) => Math.round(x).toString().replace(/\B(?=(\d{3})+$)/g, "\u202f");
const compaction = (data, frame) => `compaction ${frame} (${number(data.fed[frame])} tokens fed)`;
const percent = (position, n) => (100 * position) / n + "%";

function amount(value, unit) {
  if (unit === "slots") return number(value) + " slots";
  const k = value < 1e3 ? 0 : Math.min(3, Math.floor(Math.log10(value) / 3));
  const scaled = value / 1000 ** k;
  return (k && scaled < 100 ? scaled.toPrecision(3) : Math.round(scaled)) + " " + ["B", "kB", "MB", "GB"][k];
}

// A custom property of page.css as [red, green, blue].
function rgb(name) {
  const hex = getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}

// Draws rows of columns, each for some positions: colourOf(from, to, row) is [red, green, blue], or null for none.
function drawColumns(canvas, n, rows, colourOf) {
  const columns = Math.min(n, 2048), image = new ImageData(columns, rows);
  for (let c = 0; c < columns; c++) {
    const from = Math.floor((c * n) / columns), to = Math.floor(((c + 1) * n) / columns);
    for (let row = 0; row < rows; row++) {
      const colour = colourOf(from, to, row);
      if (colour) image.data.set([...colour, 255], 4 * (row * columns + c));
    }
  }
  Object.assign(canvas, { width: columns, height: rows }).getContext("2d").putImageData(image, 0, 0);
}

// Text beside the pointer or below a rectangle, inside the window.
function placeTip(tip, x, y, avoid = 18) {
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const below = y + avoid + height < innerHeight;
  tip.style.left = Math.max(4, Math.min(x + 12, innerWidth - width - 4)) + "px";
  tip.style.top = Math.max(4, below ? y + avoid : y - height - 10) + "px";
}

function legend(name, entries) {
  const items = entries.map(([kind, label]) => {
    const swatch = make("span", { className: "swatch " + kind, textContent: "ab", ariaHidden: "true" });
    return make("span", { className: "entry", role: "listitem" }, swatch, label);
  });
  byId("legend").replaceChildren(make("span", { className: "legend-name", textContent: name }), ...items);
}
