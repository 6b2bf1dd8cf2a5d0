// Strips over the positions of the text, all on one axis: held, label, λ, α, and the cache over steps.
//
//   position p → x = p / n · width; a step is the number of tokens fed, so it has the same axis

class Strips {
  // place: element; parts: names among "held", "label", "lambda", "alpha", "cache"; onPick(position) on a click
  constructor(place, data, parts, onPick) {
    this.data = data;
    this.place = place;
    this.rows = new Map();
    const runs = data.runs, both = runs.length > 1;
    const add = (key, title, beside, label, draw) => {
      const canvas = make("canvas", { className: "strip " + key.replace(/\d/, "") });
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", label);
      const scale = make("span", { className: "scale", textContent: beside });
      place.append(make("span", { className: "name", textContent: title, title: label }), canvas, scale);
      this.rows.set(key, { canvas, scale, draw });
    };
    if (parts.includes("held")) add("held", "held", "as the text below", "Heads that hold each position, as in the text below", () => this.drawHeld());
    const checks = runs[0].sentences.filter((s) => s[2]).length;
    add("label", "label", "hatched: re-checking", `${plural(runs[0].sentences.length, "sentence")}, ${checks} of re-checking (tall, hatched); execution is low`, (row) => this.drawLabels(row));
    runs.forEach((run, i) => {
      const name = both ? " " + "ab"[i] : "";
      const flagged = run.sentences.filter((s) => s[3] > 0);
      const most = Math.max(0, ...flagged.map((s) => s[3]));
      if (flagged.length) add("lambda" + i, "λ" + name, "0 to 1, repeated later", `λ: similarity of a sentence with a later one that repeats it; ${flagged.length} of ${run.sentences.length} are repeated, at most ${most.toFixed(2)}`, (row) => this.drawLambda(row, run));
      if (run.alphas.length) add("alpha" + i, "α" + name, "", `α of ${plural(run.alphas.length, "steered token")}`, (row) => this.drawAlpha(row, run));
    });
    add("cache", "cache", "", this.cacheLabel(), (row) => this.drawCache(row));
    add("axis", "position", "", "Axis: position, and tokens fed", (row) => this.drawAxis(row));
    this.now = make("div", { className: "now" });
    this.mark = make("div", { className: "mark", hidden: true });
    place.append(this.now, this.mark);
    for (const { canvas } of this.rows.values())
      canvas.addEventListener("click", (event) => onPick && onPick(this.positionAt(event)));
  }

  draw() {
    const { canvas } = this.rows.get("axis");
    this.left = canvas.offsetLeft;
    this.width = canvas.clientWidth;
    for (const row of this.rows.values()) row.draw(row);
    if (this.step !== undefined) this.setStep(this.step);
  }

  x(position) {
    return (position / this.data.n) * this.width;
  }

  positionAt(event) {
    const box = event.currentTarget.getBoundingClientRect();
    return Math.max(0, Math.min(this.data.n - 1, Math.floor(((event.clientX - box.left) / box.width) * this.data.n)));
  }

  setStep(step) {
    this.step = step;
    this.now.style.transform = `translateX(${this.left + this.x(step)}px)`;
  }

  setMark(position) {
    this.mark.hidden = position === null;
    if (position !== null) this.mark.style.transform = `translateX(${this.left + this.x(position + 0.5)}px)`;
  }

  // colourOf(from, to): the colour of these positions, "" for none
  setHeld(colourOf) {
    this.colourOf = colourOf;
    this.drawHeld();
  }

  drawHeld() {
    const row = this.rows.get("held");
    if (!row || !this.colourOf || !this.width) return;
    const { context, width, height } = fresh(row.canvas);
    const n = this.data.n, columns = Math.min(n, Math.round(width));
    for (let c = 0; c < columns; c++) {
      const from = Math.floor((c * n) / columns), to = Math.max(from + 1, Math.floor(((c + 1) * n) / columns));
      const colour = this.colourOf(from, to);
      if (!colour) continue;
      context.fillStyle = colour;
      context.fillRect((c * width) / columns, 0, width / columns + 0.3, height);
    }
  }

  drawLabels({ canvas }) {
    const { context, height } = fresh(canvas);
    const prompt = this.data.header.n_prompt;
    for (const [first, last, thought] of this.data.runs[0].sentences) {
      const left = this.x(first), wide = Math.max(0.5, this.x(last + 1) - left - (this.width / this.data.n > 0.3 ? 1 : 0));
      context.fillStyle = theme.get(last < prompt ? "dim" : thought ? "check" : "work");
      context.fillRect(left, thought ? 0 : height / 2, wide, thought ? height : height / 2);
      if (!thought || wide < 4) continue;
      context.strokeStyle = theme.get("paper");
      context.beginPath();
      for (let x = left + 2; x < left + wide; x += 4) context.moveTo(x, height), context.lineTo(Math.min(x + 4, left + wide), 0);
      context.stroke();
    }
  }

  drawLambda({ canvas }, run) {
    const { context, height } = fresh(canvas);
    context.fillStyle = theme.get("lambda");
    for (const [first, last, , lambda] of run.sentences) {
      const tall = Math.max(0, Math.min(1, lambda)) * height;
      if (lambda > 0) context.fillRect(this.x(first), height - tall, Math.max(0.7, this.x(last + 1) - this.x(first) - 0.5), tall);
    }
  }

  drawAlpha({ canvas, scale }, run) {
    const { context, height } = fresh(canvas);
    const most = Math.max(...run.alphas.map((pair) => Math.abs(pair[1]))) || 1;
    context.fillStyle = theme.get("ink");
    for (const [position, alpha] of run.alphas) {
      const x = this.x(position + 0.5), y = height - 3 - (Math.abs(alpha) / most) * (height - 6);
      context.fillRect(x - 0.5, y, 1, height - y);
      context.fillRect(x - 1.5, y - 1.5, 3, 3);
    }
    scale.textContent = `to ${most.toFixed(2)}, steering`;
  }

  cacheLabel() {
    const bytes = this.data.runs[0].cache.unit === "bytes";
    return `${bytes ? "Bytes" : "Slots"} of the cache (all heads) over tokens fed; dashed: a cache that drops nothing`;
  }

  drawCache({ canvas, scale }) {
    const { context, height } = fresh(canvas);
    const { runs } = this.data, { full, unit } = runs[0].cache;
    const most = [full, ...runs.map((run) => run.cache.points)].flat().reduce((most, point) => Math.max(most, point[1]), 1);
    const line = (points, colour, dash) => {
      context.strokeStyle = theme.get(colour);
      context.setLineDash(dash);
      context.lineWidth = 1.5;
      context.beginPath();
      for (const [step, value] of points) context.lineTo(this.x(step), height - 1 - (value / most) * (height - 3));
      context.stroke();
    };
    line(full, "dim", [4, 4]);
    runs.forEach((run, i) => line(run.cache.points, runs.length > 1 ? ["a3", "b3"][i] : "work", i ? [6, 2] : []));
    scale.textContent = `to ${amount(most, unit)}, dashed: full`;
  }

  drawAxis({ canvas, scale }) {
    const { context, width } = fresh(canvas);
    const n = this.data.n, rough = n / Math.max(2, width / 90);
    const power = 10 ** Math.floor(Math.log10(Math.max(1, rough)));
    const gap = power * [1, 2, 5, 10].find((k) => k * power >= rough);
    context.fillStyle = theme.get("dim");
    context.font = "11px system-ui, sans-serif";
    for (let p = 0; p <= n; p += gap) {
      context.fillRect(this.x(p), 0, 1, 4);
      if (this.x(p) < width - 24) context.fillText(number(p), this.x(p) + 3, 12);
    }
    scale.textContent = "of " + number(n);
  }
}
