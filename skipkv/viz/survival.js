// One map a KV head: x position, y frame (time runs downwards).
//
//   ends [n] → held in frame f ⇔ ends > f; several positions in a column: their share is the colour's strength

const MAP_HEIGHT = [120, 420]; // CSS pixels

class SurvivalView {
  constructor(data) {
    this.data = data;
    const run = data.runs[0], { header, n } = data;
    this.run = run;
    this.kinds = new Uint8Array(n).fill(1); // 0 prompt, 1 execution, 2 re-checking
    for (const [first, last, thought] of run.sentences) if (thought) this.kinds.fill(2, first, last + 1);
    this.kinds.fill(0, 0, header.n_prompt);
    byId("title").textContent = `Who still holds what: layer ${header.layers[0]}`;
    byId("about").textContent = "Left to right the text, top to bottom the compactions. A column that goes on downwards is a token that the head still holds.";
    byId("about").append(make("small", { textContent: `${run.method} · ${plural(n, "token")} · ${plural(data.frames - 1, "compaction")}${run.virtual ? " · evict=False: nothing was dropped, shown is what would have stayed" : ""}` }));
    legend("A token is", [["prompt", "held: prompt"], ["work", "held: execution"], ["check", "held: re-checking"], ["k0", "dropped"], ["later", "not written yet"]]);
    this.strips = new Strips(byId("strips"), data, ["label", "lambda", "alpha", "cache"], null);
    this.strips.now.hidden = true;
    this.tip = byId("tip");
    this.maps = header.heads.map((head, h) => this.addMap(head, h));
    drawAlways(() => {
      this.strips.draw();
      this.maps.forEach((map) => this.drawMap(map));
    });
  }

  addMap(head, h) {
    const { data } = this, last = data.frames - 1;
    const held = heldPositions(data, this.run, h, last);
    const kinds = [0, 0, 0];
    for (const p of held) kinds[this.kinds[p]]++;
    const summary = `in the end ${number(held.length)} of ${number(data.fed[last])}: ${number(kinds[0])} of the prompt, ${number(kinds[1])} of execution, ${number(kinds[2])} of re-checking`;
    const canvas = make("canvas", { tabIndex: 0 });
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Head ${head}, ${summary}. Arrow keys move the reading.`);
    canvas.style.height = Math.max(MAP_HEIGHT[0], Math.min(MAP_HEIGHT[1], data.frames)) + "px";
    const steps = make("div", { className: "steps" });
    const few = Math.max(1, Math.ceil(data.frames / 6));
    for (let f = 0; f < data.frames; f += few) {
      const mark = make("span", { textContent: f ? number(data.fed[f]) : "start" });
      mark.style.top = (100 * (f + 0.5)) / data.frames + "%";
      steps.append(mark);
    }
    const title = make("h2", { textContent: `head ${head} ` }, make("small", { textContent: summary }));
    byId("maps").append(make("div", { className: "map" }, title, steps, canvas));
    const map = { head, h, canvas, at: [0, last] };
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect(), inside = (x, of) => Math.max(0, Math.min(of - 1, Math.floor(x * of)));
      map.at = [inside((event.clientX - box.left) / box.width, data.n), inside((event.clientY - box.top) / box.height, data.frames)];
      this.tell(map, event.clientX, event.clientY);
    });
    const leave = () => ((this.tip.hidden = true), this.strips.setMark(null));
    canvas.addEventListener("pointerleave", leave);
    canvas.addEventListener("blur", leave);
    canvas.addEventListener("keydown", (event) => this.key(event, map, leave));
    return map;
  }

  key(event, map, leave) {
    const move = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
    if (event.key === "Escape") leave();
    if (!move) return;
    event.preventDefault();
    const limit = [this.data.n - 1, this.data.frames - 1];
    map.at = map.at.map((x, i) => Math.max(0, Math.min(limit[i], x + move[i])));
    const box = map.canvas.getBoundingClientRect();
    this.tell(map, box.left + (box.width * (map.at[0] + 0.5)) / this.data.n, box.top + (box.height * (map.at[1] + 0.5)) / this.data.frames);
    byId("spoken").textContent = this.tip.textContent;
  }

  tell(map, x, y) {
    const { data, run } = this, [p, frame] = map.at, end = run.ends[map.h * data.n + p];
    const step = (f) => `compaction ${f} (${number(data.fed[f])} tokens fed)`;
    const state = p >= data.fed[frame] ? "not written yet" : end > frame ? (end === run.never ? "held, to the end" : "held, until " + step(end)) : "dropped by " + step(end);
    const s = sentencesOf(run, data.n).find((s) => s.last >= p);
    const lines = [
      `position ${p}, ${["prompt", "execution", "re-checking"][this.kinds[p]]}` + (s.number ? `, sentence ${s.number}${s.lambda > 0 ? ", λ " + s.lambda.toFixed(3) : ""}` : ""),
      frame ? "after " + step(frame) : "before the first compaction", state,
    ];
    this.tip.replaceChildren(make("code", { textContent: visible(data.header.texts[p], false).replace(/\n/g, "") }), ...lines.map((text) => make("div", { textContent: text })));
    this.strips.setMark(p);
    placeTip(this.tip, x, y);
  }

  drawMap({ h, canvas }) {
    const { data, run } = this, { n, frames, fed } = data;
    const { context, width, height } = fresh(canvas);
    const columns = Math.max(1, Math.min(n, canvas.width));
    const image = new ImageData(columns, frames);
    const paper = theme.rgb("paper"), gone = theme.rgb("k0"), colours = ["ink", "work", "check"].map((name) => theme.rgb(name));
    const ends = run.ends.subarray(h * n, (h + 1) * n);
    for (let c = 0; c < columns; c++) {
      const from = Math.floor((c * n) / columns), to = Math.max(from + 1, Math.floor(((c + 1) * n) / columns));
      for (let f = 0; f < frames; f++) {
        const held = [0, 0, 0];
        let written = 0;
        for (let p = from; p < to && p < fed[f]; p++) {
          written++;
          if (ends[p] > f) held[this.kinds[p]]++;
        }
        const at = 4 * (f * columns + c), some = held[0] + held[1] + held[2];
        for (let k = 0; k < 3; k++) {
          const mixed = held.reduce((sum, x, kind) => sum + x * colours[kind][k], 0) + (written - some) * gone[k];
          image.data[at + k] = written ? mixed / written : paper[k];
        }
        image.data[at + 3] = 255;
      }
    }
    const small = make("canvas", { width: columns, height: frames });
    small.getContext("2d").putImageData(image, 0, 0);
    context.imageSmoothingEnabled = columns > width;
    context.drawImage(small, 0, 0, width, height);
  }
}

unpack(byId("data").textContent).then(
  (data) => (window.view = new SurvivalView(data)),
  (error) => (byId("about").textContent = "This browser cannot read the page's data: " + error),
);
