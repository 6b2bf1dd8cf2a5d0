// Small helpers: elements, numbers, colours of the theme, canvases in device pixels.

const byId = (id) => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

const plural = (n, word) => number(n) + " " + word + (n === 1 ? "" : "s");
const number = (x) => Math.round(x).toString().replace(/\B(?=(\d{3})+$)/g, "\u202f");

function amount(value, unit) {
  if (unit === "slots") return number(value) + " slots";
  const k = value < 1e3 ? 0 : Math.min(3, Math.floor(Math.log10(value) / 3));
  const scaled = value / 1000 ** k;
  return (k && scaled < 100 ? scaled.toPrecision(3) : Math.round(scaled)) + " " + ["B", "kB", "MB", "GB"][k];
}

const figure = (x) => (Number.isNaN(x) ? "not finite" : x === 0 ? "0" : Math.abs(x) < 1e-3 ? x.toExponential(2) : x.toFixed(5));

// Custom properties of page.css, as canvases need them.
const theme = {
  cache: {},
  get(name) {
    return (this.cache[name] ??= getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim());
  },
  rgb(name) {
    const hex = this.get(name);
    return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  },
};

// Calls `draw` now, when the theme changes and when the window's width does.
function drawAlways(draw) {
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    theme.cache = {};
    draw();
  });
  let width = innerWidth, due = 0;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    cancelAnimationFrame(due);
    due = requestAnimationFrame(draw);
  });
}

// A cleared context whose unit is the CSS pixel, and the canvas's size in it.
function fresh(canvas) {
  const scale = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  return { context, width, height };
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
  byId("legend").replaceChildren(
    make("span", { className: "legend-name", textContent: name }),
    ...entries.map(([kind, label]) => {
      const item = make("span", { className: "entry" }, make("span", { className: "swatch " + kind, textContent: "ab" }), label);
      item.firstChild.setAttribute("aria-hidden", "true");
      item.setAttribute("role", "listitem");
      return item;
    }),
  );
}
