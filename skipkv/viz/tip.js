// What is known about one token: its place, sentence, who holds it, its scores.

class Tip {
  constructor(data) {
    this.data = data;
    this.node = byId("tip");
    this.prefix = data.runs.map((_, i) => (data.runs.length > 1 ? "ab"[i] + ": " : ""));
  }

  // view: {frame, chosen: indices of heads}
  show(position, view, x, y, avoid) {
    const { data } = this, { runs } = data;
    const lines = [make("code", { textContent: visible(data.header.texts[position], false).replace(/\n/g, "") })];
    const add = (text, className = "") => lines.push(make("div", { textContent: text, className }));
    add(`position ${position}${position < data.header.n_prompt ? ", prompt" : ""}`);
    runs.forEach((run, i) => this.aboutSentence(position, run, i, add));
    if (position >= data.fed[view.frame]) add("not written yet");
    else {
      runs.forEach((run, i) => add(this.prefix[i] + this.aboutHeld(position, run, view)));
      if (data.header.layers.length * data.header.heads.length > 1) lines.push(this.matrix(position, view));
      if (view.chosen.length === 1) runs.forEach((run, i) => this.aboutScores(position, run, i, view, lines));
      else if (view.frame && runs.some((run) => run.scores)) add("choose one layer and one head to see its scores", "faint");
    }
    this.node.replaceChildren(...lines);
    placeTip(this.node, x, y, avoid);
    return lines.map((line) => line.textContent).filter(Boolean).join("; ");
  }

  aboutSentence(position, run, i, add) {
    const s = run.blocks.find((s) => s.last >= position), alpha = run.alphas.get(position);
    if (i === 0) add(s.number ? `sentence ${s.number}, ${s.thought ? "re-checking" : "execution"}${s.repeats ? ", repeats an earlier one" : ""}` : "sentence not finished");
    if (s.number) add(this.prefix[i] + (s.lambda > 0 ? `λ ${s.lambda.toFixed(3)} by the end: a later sentence repeats it` : "λ 0: not repeated later"));
    if (alpha !== undefined) add(this.prefix[i] + `steered, α ${alpha.toFixed(2)}`);
  }

  aboutHeld(position, run, { frame, chosen }) {
    const { data } = this, ends = chosen.map((h) => run.ends[h * data.n + position]);
    if (ends.length > 1) return `held by ${ends.filter((end) => end > frame).length} of ${plural(ends.length, "head")}`;
    if (ends[0] <= frame) return "dropped by " + compaction(data, ends[0]);
    return ends[0] === run.never ? "held to the end" : "held, until " + compaction(data, ends[0]);
  }

  // One square a head, rows are KV heads, columns layers; two half squares for two runs.
  matrix(position, { frame, chosen }) {
    const { runs, n, header: { layers, heads } } = this.data, inside = new Set(chosen), two = runs.length > 1;
    const size = layers.length > 40 ? 6 : layers.length > 16 ? 9 : 13;
    const grid = make("div", { className: "squares", style: `grid-template-columns: repeat(${layers.length}, ${size}px); grid-auto-rows: ${size}px` });
    for (let k = 0; k < heads.length; k++)
      for (let l = 0; l < layers.length; l++) {
        const h = l * heads.length + k, held = (run, i) => (run.ends[h * n + position] > frame ? (two ? "ab"[i] : "held") : "");
        grid.append(make("i", { className: inside.has(h) ? "" : "outside" }, ...runs.map((run, i) => make("b", { className: held(run, i) }))));
      }
    return make("div", { className: "grid" }, grid, make("small", { textContent: `↓ KV heads, → layers; ${two ? "left half a, right half b" : "filled: held"}` }));
  }

  aboutScores(position, run, i, { frame, chosen: [head] }, lines) {
    const { data } = this;
    if (!run.scores || frame === 0) return;
    const say = (text) => lines.push(make("div", { textContent: this.prefix[i] + text, className: "faint" }));
    if (!run.scores.has(frame + "," + head)) return say("this head was not compacted at this step");
    const found = scoresAt(data, run, head, frame, position);
    if (!found) return say(run.ends[head * data.n + position] < frame ? "no score: it was gone before" : "no score: among the newest, kept outright");
    const table = make("table");
    const row = (name, text) => table.append(make("tr", {}, make("th", { textContent: name, scope: "row" }), make("td", { textContent: text })));
    const figure = (x) => (Number.isNaN(x) ? "not finite" : x === 0 ? "0" : Math.abs(x) < 1e-3 ? x.toExponential(2) : x.toFixed(5));
    for (const name of ["importance", "redundancy", "penalty", "score"]) if (name in found) row(name, figure(found[name]));
    if (found.rank) row("rank", `${found.rank} of ${found.size} candidates`);
    if (this.prefix[i]) say("scores");
    lines.push(table);
  }
}
