// One map a KV head: x position, y frame (time runs downwards).
//
//   ends [n] → held in frame f ⇔ ends > f; several positions in a column: their share is the colour's strength

const KINDS_OF_TOKENS = ["prompt", "execution", "re-checking"];

class SurvivalView {
  constructor(data) {
    this.data = data;
    const run = data.runs[0], { header, n } = data;
    this.run = run;
    this.kinds = new Uint8Array(n).fill(1); // places in KINDS_OF_TOKENS
    for (const s of run.sentences) if (s.thought) this.kinds.fill(2, s.first, s.last + 1);
    this.kinds.fill(0, 0, header.n_prompt);
    byId("maps").hidden = false;
    introduce(
      `Who still holds what: layer ${header.layers[0]}`,
      "Left to right the text, top to bottom the compactions. A column that goes on downwards is a token that the head still holds.",
      `${run.method} · ${plural(n, "token")} · ${plural(data.frames - 1, "compaction")}${run.virtual ? " · evict=False: nothing was dropped, shown is what would have stayed" : ""}`,
    );
    legend("A token is", [["prompt", "held: prompt"], ["work", "held: execution"], ["check", "held: re-checking"], ["k0", "dropped"], ["later", "not written yet"]]);
    this.strips = new Strips(byId("strips"), data, null);
    this.tip = byId("tip");
    this.maps = header.heads.map((head, h) => this.addMap(head, h));
  }

  addMap(head, h) {
    const { data, kinds } = this, { n, frames, fed } = data, last = frames - 1;
    const held = heldPositions(data, this.run, h, last);
    const [prompt, work, check] = [0, 1, 2].map((kind) => number(held.filter((p) => kinds[p] === kind).length));
    const summary = `in the end ${number(held.length)} of ${number(fed[last])}: ${prompt} of the prompt, ${work} of execution, ${check} of re-checking`;
    const canvas = picture("canvas", `Head ${head}, ${summary}. Arrow keys move the reading.`, { tabIndex: 0 });
    canvas.style.height = Math.max(120, Math.min(420, frames)) + "px";
    const steps = make("div", { className: "steps" });
    for (let f = 0; f < frames; f += Math.max(1, Math.ceil(frames / 6)))
      steps.append(make("span", { textContent: f ? number(fed[f]) : "start", style: `top: ${percent(f + 0.5, frames)}` }));
    const title = make("h2", { textContent: `head ${head} ` }, make("small", { textContent: summary }));
    byId("maps").append(make("div", { className: "map" }, title, steps, canvas));
    const map = { h, canvas, at: [0, last] };
    const leave = () => ((this.tip.hidden = true), this.strips.setMark(null));
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect();
      this.tell(map, Math.floor(((event.clientX - box.left) / box.width) * n), Math.floor(((event.clientY - box.top) / box.height) * frames), event.clientX, event.clientY);
    });
    for (const name of ["pointerleave", "blur"]) canvas.addEventListener(name, leave);
    canvas.addEventListener("keydown", (event) => this.key(event, map, leave));
    return map;
  }

  key(event, map, leave) {
    const move = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
    if (event.key === "Escape") leave();
    if (!move) return;
    event.preventDefault();
    this.tell(map, map.at[0] + move[0], map.at[1] + move[1]);
    byId("spoken").textContent = this.tip.textContent;
  }

  // About one cell, the nearest that there is; beside the pointer, or the cell itself.
  tell(map, p, frame, x, y) {
    const { data, run } = this, { n, frames, fed } = data, box = map.canvas.getBoundingClientRect();
    p = Math.max(0, Math.min(n - 1, p));
    frame = Math.max(0, Math.min(frames - 1, frame));
    map.at = [p, frame];
    const end = run.ends[map.h * n + p], s = run.blocks.find((s) => s.last >= p);
    const held = end === run.never ? "held, to the end" : "held, until " + compaction(data, end);
    const lines = [
      `position ${p}, ${KINDS_OF_TOKENS[this.kinds[p]]}` + (s.number ? `, sentence ${s.number}${s.lambda > 0 ? ", λ " + s.lambda.toFixed(3) : ""}` : ""),
      frame ? "after " + compaction(data, frame) : "before the first compaction",
      p >= fed[frame] ? "not written yet" : end > frame ? held : "dropped by " + compaction(data, end),
    ];
    this.tip.replaceChildren(make("code", { textContent: visible(data.header.texts[p], false).replace(/\n/g, "") }), ...lines.map((text) => make("div", { textContent: text })));
    this.strips.setMark(p);
    placeTip(this.tip, x ?? box.left + (box.width * (p + 0.5)) / n, y ?? box.top + (box.height * (frame + 0.5)) / frames);
  }

  draw() {
    const { kinds, run, data: { n, frames, fed } } = this;
    const colours = ["ink", "work", "check", "k0"].map(rgb), paper = rgb("paper");
    for (const { h, canvas } of this.maps)
      drawColumns(canvas, n, frames, (from, to, f) => {
        const shares = [0, 0, 0, 0], written = Math.min(to, fed[f]) - from;
        for (let p = from; p < from + written; p++) shares[run.ends[h * n + p] > f ? kinds[p] : 3] += 1 / written;
        return written > 0 ? [0, 1, 2].map((k) => shares.reduce((sum, share, i) => sum + share * colours[i][k], 0)) : paper;
      });
  }
}

start(SurvivalView);
