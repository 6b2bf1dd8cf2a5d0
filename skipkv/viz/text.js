// The text, coloured by who holds each token; for one run ("kept") or two ("compare").
//
//   slider, layer, head, show → counts [n] → a code a token → the class of those tokens whose code changed
//
// Only sentences near the window are brought up to date at once, the others when they come near it: the cost of a move
// of the slider does not grow with the text.

const LEVELS = 8;
// Codes index this list. k0: held by no head; k1 … k8: by few … by all; a, b: more heads in that run (3: all of them).
const CLASSES = ["later", "k0", ...Array.from({ length: LEVELS }, (_, i) => "k" + (i + 1)), "both", "a1", "a2", "a3", "b1", "b2", "b3"];
const code = (name) => CLASSES.indexOf(name);
const levelOf = (count, of) => (count === 0 ? 0 : of === 1 ? LEVELS : 1 + Math.round(((count - 1) / (of - 1)) * (LEVELS - 1)));
// Share of the heads that hold it in one run only → 1, 2, 3.
const strength = (difference, of) => Math.min(3, Math.ceil((3 * Math.abs(difference)) / of));

class TextView {
  constructor(data) {
    this.data = data;
    const n = data.n;
    this.codes = new Uint8Array(n); // wanted
    this.painted = new Uint8Array(n).fill(255);
    this.near = new Set();
    this.counts = [new Uint16Array(n), new Uint16Array(n), new Uint16Array(n)]; // first run, second run, both
    this.two = data.runs.length > 1;
    this.tip = new Tip(data);
    byId("controls").hidden = byId("text").hidden = false;
    this.writeHead();
    this.writeText();
    this.watch();
    this.strips = new Strips(byId("strips"), data, (p) => {
      this.spans[p].scrollIntoView({ block: "center" });
      this.inspect(p, true);
    });
    this.frame = data.header.start;
    Object.assign(byId("frame"), { max: data.frames - 1, value: this.frame, disabled: data.frames === 1 });
    byId("play").disabled = data.frames === 1;
    this.choose();
    this.listen();
  }

  writeHead() {
    const { header, runs, n } = this.data;
    const names = this.two ? runs.map((run, i) => "ab"[i] + " = " + run.method).join(", ") : runs[0].method;
    introduce(
      this.two ? "What two caches kept" : "What the cache kept",
      this.two ? "One text, two methods. Every token shows whose cache still holds its key and value: both, only one, or none."
        : "Every token of the text, coloured by how many attention heads still hold its key and value. Move the slider to see the cache shrink.",
      `${names} · ${runs[0].model ? runs[0].model + " · " : ""}${plural(n, "token")}, ${number(header.n_prompt)} of them prompt · ${plural(header.n_layers, "layer")} × ${plural(header.n_kv_heads, "KV head")}`,
    );
    const fill = (id, all, texts) => byId(id).append(...(all ? [new Option(all, "")] : []), ...texts.map((text, i) => new Option(text, i)));
    for (const [id, values] of [["layer", header.layers], ["head", header.heads]])
      fill(id, values.length > 1 && `all (${values.length})`, values.map((value) => `${id} ${value}`));
    fill("show", "differences", ["a alone", "b alone"]);
    byId("shown").hidden = !this.two;
    const notes = [];
    if (runs.some((run) => run.virtual)) notes.push("evict=False: the run dropped nothing; shown is what the method would have kept.");
    if (header.left_out) notes.push(`Scores were recorded but are left out: with them this page would exceed ${header.left_out / 1e6} MB. Choose fewer layers or heads when making it.`);
    if (header.texts.some((text) => text.includes("\ufffd"))) notes.push("A dotted � is a token that holds only a part of a character.");
    byId("note").textContent = notes.join(" ");
  }

  writeText() {
    const { header, runs } = this.data;
    this.spans = [];
    this.blocks = runs[0].blocks;
    for (const s of this.blocks) {
      const body = make("div", { className: "body" });
      for (let p = s.first; p <= s.last; p++) {
        const text = header.texts[p];
        this.spans[p] = make("span", { textContent: visible(text, p === s.last), at: p, extra: text.includes("\ufffd") ? " part" : "" });
        body.append(this.spans[p]);
      }
      const kind = s.last < header.n_prompt ? "prompt" : !s.number ? "" : s.thought ? "re-check" : "";
      const margin = make("div", { className: "margin" },
        make("span", { className: "number", textContent: s.number || "…" }),
        make("span", { className: "kind " + kind, textContent: kind }),
        make("span", { className: "lambda", textContent: s.lambda > 0 ? (this.two ? "λ a " : "λ ") + s.lambda.toFixed(2) : "" }));
      margin.title = s.number ? `sentence ${s.number}: ${s.thought ? "re-checking" : "execution"}, λ ${s.lambda}` : "not finished";
      s.node = make("div", { className: "sentence" + (s.thought ? " check" : ""), sentence: s }, margin, body);
    }
    byId("text").append(...this.blocks.map((s) => s.node));
  }

  watch() {
    const watcher = new IntersectionObserver((changes) => {
      for (const { target, isIntersecting } of changes) {
        this.near[isIntersecting ? "add" : "delete"](target.sentence);
        if (isIntersecting) this.paintSentence(target.sentence);
      }
    }, { root: byId("text"), rootMargin: "600px 0px" });
    for (const s of this.blocks) watcher.observe(s.node);
    addEventListener("beforeprint", () => this.blocks.forEach((s) => this.paintSentence(s)));
  }

  paintSentence({ first, last }) {
    const { codes, painted, spans } = this;
    for (let p = first; p <= last; p++) {
      if (codes[p] === painted[p]) continue;
      painted[p] = codes[p];
      spans[p].className = CLASSES[codes[p]] + spans[p].extra + (p === this.at ? " here" : "");
    }
  }

  // Reads the controls.
  choose() {
    const { layers, heads } = this.data.header;
    const all = (select, list) => (select.value === "" ? list.map((_, i) => i) : [Number(select.value)]);
    this.chosen = all(byId("layer"), layers).flatMap((l) => all(byId("head"), heads).map((k) => l * heads.length + k));
    this.shown = this.two ? byId("show").value : "0";
    this.writeLegend();
    this.paint();
  }

  writeLegend() {
    const n = this.chosen.length, entries = [];
    if (this.shown === "") {
      entries.push(["k0", "by neither"], ["both", n > 1 ? "by as many heads in both" : "by both"]);
      for (const which of "ab") {
        if (n > 1) entries.push([which + "1", `by more heads in ${which}`]);
        entries.push([which + "3", n > 1 ? `by far more in ${which}` : `only by ${which}`]);
      }
    } else if (n === 1) entries.push(["k0", "dropped"], ["k8", "held"]);
    else {
      entries.push(["k0", "none"]);
      for (let first = 1, last = 1; first <= n; first = ++last) {
        while (last < n && levelOf(last + 1, n) === levelOf(first, n)) last++;
        entries.push(["k" + levelOf(first, n), first < last ? `${first}–${last}` : last === n ? `all ${n}` : `${first}`]);
      }
    }
    entries.push(["later", "not written yet"]);
    legend(this.shown === "" ? "A token is held" : n > 1 ? `Heads that hold a token, of ${n}:` : "A token is", entries);
  }

  paint() {
    const { data, chosen, frame, counts } = this, { runs, n, fed } = data, of = chosen.length;
    this.held = runs.map((run, i) => countHeld(data, [run], chosen, frame, counts[i]));
    if (this.two) this.held.push(countHeld(data, runs, chosen, frame, counts[2]));
    const [a, b] = counts, k0 = code("k0"), both = code("both"), first = { a: code("a1"), b: code("b1") };
    const levels = Array.from({ length: of + 1 }, (_, c) => k0 + levelOf(c, of));
    const difference = (x, y) => (x === y ? (x ? both : k0) : first[x > y ? "a" : "b"] + strength(x - y, of) - 1);
    for (let p = 0; p < n; p++) {
      if (p >= fed[frame]) this.codes[p] = code("later");
      else this.codes[p] = this.shown === "" ? difference(a[p], b[p]) : levels[counts[this.shown][p]];
    }
    this.near.forEach((s) => this.paintSentence(s));
    this.writeState();
    if (this.at != null && !this.tip.node.hidden) this.inspect(this.at, false);
    this.strips.setStep(fed[frame]);
    this.draw();
  }

  // The strip's column: the mean level of its positions, or the difference that most of them show.
  draw() {
    const colours = CLASSES.map(rgb), { data, codes } = this;
    drawColumns(this.strips.held, data.n, 1, (from, to) => {
      const seen = codes.subarray(from, Math.min(to, data.fed[this.frame]));
      if (!seen.length) return null;
      if (this.shown !== "") return colours[Math.round(seen.reduce((sum, c) => sum + c, 0) / seen.length)];
      const votes = CLASSES.map((_, c) => seen.filter((x) => x === c).length);
      return colours[votes.indexOf(Math.max(...votes))];
    });
  }

  writeState() {
    const { data, frame, chosen, held } = this, fed = data.fed[frame], total = data.frames - 1, of = chosen.length;
    const when = !total ? "nothing was compacted" : frame ? `after compaction ${frame} of ${total}` : `before the first of ${total} compactions`;
    const where = `${when}, ${number(fed)} tokens fed`;
    const sums = held.map((list) => list.reduce((sum, c) => sum + c, 0));
    const slots = fed * of, share = (x) => (slots ? Math.round((100 * x) / slots) : 0) + " %", part = (name, x) => `${name} ${number(x)} (${share(x)})`;
    let what;
    if (this.two) {
      const [a, b, both] = sums;
      what = `${plural(slots, "slot")} of ${plural(of, "head")}: ` + [part("both hold", both), part("only a", a - both), part("only b", b - both), part("neither", slots - a - b + both)].join(", ");
    } else {
      const alike = held[0].every((size) => size === held[0][0]) ? "" : " on average";
      what = `${of > 1 ? `each of ${number(of)} heads holds ` : "the head holds "}${number(sums[0] / of)}${alike} of ${number(fed)} (${share(sums[0])})`;
      const size = data.runs[0].bytes.find((pair) => pair[0] === fed);
      if (size && frame) what += `, the whole cache takes ${amount(size[1], "bytes")}`;
    }
    byId("state").textContent = where[0].toUpperCase() + where.slice(1) + ": " + what + ".";
    byId("frame").setAttribute("aria-valuetext", where);
  }

  inspect(position, speak) {
    const span = this.spans[position], box = span.getBoundingClientRect();
    this.focus(position);
    this.pinned ||= speak;
    const text = this.tip.show(position, this, box.left, box.bottom, 4);
    if (speak) byId("spoken").textContent = text;
  }

  focus(position) {
    this.spans[this.at]?.classList.remove("here");
    this.at = position;
    this.spans[position]?.classList.add("here");
    this.strips.setMark(position);
  }

  listen() {
    const main = byId("text"), slider = byId("frame");
    slider.addEventListener("input", () => this.setFrame(Number(slider.value)));
    addEventListener("message", ({ source, data }) => {
      const follow = source === parent && source !== window && Number.isInteger(data?.skipkvStep);
      if (follow) this.setFrame(this.data.header.steps.filter((step) => step <= data.skipkvStep).length, false);
    });
    for (const id of ["layer", "head", "show"]) byId(id).addEventListener("change", () => this.choose());
    let pointer = "";
    main.addEventListener("pointermove", (event) => (pointer = event.clientX + "," + event.clientY));
    main.addEventListener("pointerover", (event) => {
      // Text that scrolls under a resting pointer is not pointed at: keys that scroll keep their place.
      if (event.target.at === undefined || (this.pinned && pointer === event.clientX + "," + event.clientY)) return;
      this.pinned = false;
      this.focus(event.target.at);
      this.tip.show(event.target.at, this, event.clientX, event.clientY);
    });
    for (const name of ["pointerleave", "blur"]) main.addEventListener(name, () => this.leave());
    main.addEventListener("scroll", () => this.scrolled());
    main.addEventListener("keydown", (event) => this.key(event));
    byId("play").addEventListener("click", () => this.play());
  }

  leave() {
    this.tip.node.hidden = true;
    this.focus(null);
  }

  // What a key or a click on a strip told about was scrolled into view by that, and its tooltip goes along.
  scrolled() {
    const area = byId("text").getBoundingClientRect(), box = this.at != null && this.spans[this.at].getBoundingClientRect();
    if (this.pinned && box && box.bottom > area.top && box.top < area.bottom) this.inspect(this.at, false);
    else this.tip.node.hidden = true;
  }

  key(event) {
    const at = this.at ?? this.last ?? 0, n = this.data.n;
    const sentence = () => this.blocks.findIndex((s) => s.last >= at);
    const moves = {
      ArrowRight: () => at + 1, ArrowLeft: () => at - 1, Home: () => 0, End: () => n - 1,
      ArrowDown: () => (this.blocks[sentence() + 1] || { first: n - 1 }).first,
      ArrowUp: () => (this.blocks[sentence() - 1] || { first: 0 }).first,
    };
    if (event.key === "Escape") return this.leave();
    if (!moves[event.key]) return;
    event.preventDefault();
    this.last = Math.max(0, Math.min(n - 1, moves[event.key]()));
    this.spans[this.last].scrollIntoView({ block: "nearest" });
    this.inspect(this.last, true);
  }

  // `tell`: to the report around this page, which moves the pages beside it.
  setFrame(frame, tell = true) {
    this.frame = byId("frame").value = frame;
    this.paint();
    if (tell && parent !== window) parent.postMessage({ skipkvStep: frame && this.data.header.steps[frame - 1] }, "*");
  }

  play() {
    const button = byId("play"), total = this.data.frames;
    const stop = () => {
      this.timer = clearInterval(this.timer);
      Object.assign(button, { textContent: "▶", ariaLabel: "Play the compactions" });
    };
    if (this.timer) return stop();
    Object.assign(button, { textContent: "⏸", ariaLabel: "Stop" });
    if (this.frame === total - 1) this.setFrame(0);
    this.timer = setInterval(() => (this.frame < total - 1 ? this.setFrame(this.frame + 1) : stop()), Math.max(60, Math.min(500, 12000 / total)));
  }
}

start(TextView);
