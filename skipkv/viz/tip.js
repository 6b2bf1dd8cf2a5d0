// What is known about one token: its place, sentence, who holds it, its scores.

class Tip {
  constructor(data) {
    this.data = data;
    this.node = byId("tip");
    this.sentences = data.runs.map((run) => {
      const of = new Int32Array(data.n), found = sentencesOf(run, data.n);
      found.forEach((s, i) => of.fill(i, s.first, s.last + 1));
      return { of, found };
    });
    this.alphas = data.runs.map((run) => new Map(run.alphas));
  }

  // view: {frame, chosen: indices of heads}
  show(position, view, x, y, avoid) {
    const { data } = this;
    const lines = [make("code", { textContent: visible(data.header.texts[position], false).replace(/\n/g, "") })];
    const add = (text, className = "") => lines.push(make("div", { textContent: text, className }));
    add(`position ${position}${position < data.header.n_prompt ? ", prompt" : ""}`);
    data.runs.forEach((run, i) => this.aboutSentence(position, i, add));
    if (position >= data.fed[view.frame]) add("not written yet");
    else {
      data.runs.forEach((run, i) => add(this.aboutHeld(position, run, i, view)));
      lines.push(this.matrix(position, view));
      if (view.chosen.length === 1) data.runs.forEach((run, i) => this.aboutScores(position, run, i, view, lines));
      else if (view.frame && data.runs.some((run) => run.scores)) add("choose one layer and one head to see its scores", "faint");
    }
    this.node.replaceChildren(...lines);
    placeTip(this.node, x, y, avoid);
    return lines.map((line) => line.textContent).filter(Boolean).join("; ");
  }

  hide() {
    this.node.hidden = true;
  }

  prefix(i) {
    return this.data.runs.length > 1 ? "ab"[i] + ": " : "";
  }

  aboutSentence(position, i, add) {
    const { of, found } = this.sentences[i], s = found[of[position]];
    const alpha = this.alphas[i].get(position);
    if (i === 0) add(s.number ? `sentence ${s.number}, ${s.thought ? "re-checking" : "execution"}${s.repeats ? ", repeats an earlier one" : ""}` : "sentence not finished");
    if (s.number) add(this.prefix(i) + (s.lambda > 0 ? `λ ${s.lambda.toFixed(3)} by the end: a later sentence repeats it` : "λ 0: not repeated later"));
    if (alpha !== undefined) add(this.prefix(i) + `steered, α ${alpha.toFixed(2)}`);
  }

  aboutHeld(position, run, i, { frame, chosen }) {
    const { data } = this, n = data.n;
    const held = chosen.filter((h) => run.ends[h * n + position] > frame).length;
    if (chosen.length > 1) return this.prefix(i) + `held by ${held} of ${plural(chosen.length, "head")}`;
    const end = run.ends[chosen[0] * n + position];
    const step = (f) => `compaction ${f} (${number(data.fed[f])} tokens fed)`;
    if (end > frame) return this.prefix(i) + (end === run.never ? "held to the end" : "held, until " + step(end));
    return this.prefix(i) + "dropped by " + step(end);
  }

  // One square a head, rows are KV heads, columns layers; two half squares for two runs.
  matrix(position, { frame, chosen }) {
    const { data } = this, { layers, heads } = data.header;
    const cell = layers.length > 40 ? 6 : layers.length > 16 ? 9 : 13, inside = new Set(chosen), runs = data.runs;
    if (layers.length * heads.length < 2) return make("div");
    const canvas = make("canvas", { className: "matrix" });
    canvas.width = 2 * layers.length * cell;
    canvas.height = 2 * heads.length * cell;
    canvas.style.width = layers.length * cell + "px";
    const context = canvas.getContext("2d");
    context.scale(2, 2);
    for (let l = 0; l < layers.length; l++)
      for (let k = 0; k < heads.length; k++) {
        const h = l * heads.length + k, left = l * cell + 1, top = k * cell + 1, size = cell - 2;
        const held = runs.map((run) => run.ends[h * data.n + position] > frame);
        context.globalAlpha = inside.has(h) ? 1 : 0.35;
        context.strokeStyle = theme.get("dim");
        context.strokeRect(left + 0.5, top + 0.5, size - 1, size - 1);
        held.forEach((yes, i) => {
          context.fillStyle = theme.get(runs.length > 1 ? ["a3", "b3"][i] : "work");
          if (yes) context.fillRect(left + (i * size) / runs.length, top, size / runs.length, size);
        });
      }
    const caption = runs.length > 1 ? "left half a, right half b" : "filled: held";
    return make("div", { className: "grid" }, canvas, make("small", { textContent: `↓ KV heads, → layers; ${caption}` }));
  }

  aboutScores(position, run, i, { frame, chosen }, lines) {
    const { data } = this;
    if (!run.scores || frame === 0) return;
    const say = (text) => lines.push(make("div", { textContent: this.prefix(i) + text, className: "faint" }));
    const head = chosen[0];
    if (!run.scores.has(frame + "," + head)) return say("this head was not compacted at this step");
    const found = scoresAt(data, run, head, frame, position);
    if (!found) return say(run.ends[head * data.n + position] < frame ? "no score: it was gone before" : "no score: among the newest, kept outright");
    const table = make("table");
    for (const name of ["importance", "redundancy", "penalty", "score"])
      if (name in found) table.append(make("tr", {}, make("th", { textContent: name, scope: "row" }), make("td", { textContent: figure(found[name]) })));
    if (found.rank) table.append(make("tr", {}, make("th", { textContent: "rank", scope: "row" }), make("td", { textContent: `${found.rank} of ${found.size} candidates` })));
    if (this.prefix(i)) say("scores");
    lines.push(table);
  }
}
