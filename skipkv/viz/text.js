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
    this.writeHead();
    this.writeText();
    this.watch();
    const parts = ["held", "label", "lambda", "alpha", "cache"];
    this.strips = new Strips(byId("strips"), data, parts, (p) => this.goTo(p));
    this.frame = data.header.start;
    byId("frame").max = data.frames - 1;
    byId("frame").value = this.frame;
    byId("frame").disabled = byId("play").disabled = data.frames === 1;
    this.choose();
    drawAlways(() => {
      this.strips.draw();
      this.paintStrip();
    });
    this.listen();
  }

  writeHead() {
    const { header, runs, n } = this.data;
    const names = this.two ? runs.map((run, i) => "ab"[i] + " = " + run.method).join(", ") : runs[0].method;
    byId("title").textContent = this.two ? "What two caches kept" : "What the cache kept";
    byId("about").textContent = this.two
      ? "One text, two methods. Every token shows whose cache still holds its key and value: both, only one, or none."
      : "Every token of the text, coloured by how many attention heads still hold its key and value. Move the slider to see the cache shrink.";
    byId("about").append(make("small", { textContent: `${names} · ${runs[0].model ? runs[0].model + " · " : ""}${plural(n, "token")}, ${number(header.n_prompt)} of them prompt · ${plural(header.n_layers, "layer")} × ${plural(header.n_kv_heads, "KV head")}` }));
    const fill = (select, all, values, word) => {
      if (values.length > 1) select.append(make("option", { value: "", textContent: `${all} (${values.length})` }));
      values.forEach((value, i) => select.append(make("option", { value: i, textContent: `${word} ${value}` })));
    };
    fill(byId("layer"), "all", header.layers, "layer");
    fill(byId("head"), "all", header.heads, "head");
    if (this.two) {
      byId("shown").hidden = false;
      for (const [value, text] of [["", "differences"], ["0", "a alone"], ["1", "b alone"]]) byId("show").append(make("option", { value, textContent: text }));
    }
    const notes = [];
    if (runs.some((run) => run.virtual)) notes.push("evict=False: the run dropped nothing; shown is what the method would have kept.");
    if (header.left_out) notes.push(`Scores were recorded but are left out: with them this page would exceed ${header.left_out / 1e6} MB. Choose fewer layers or heads when making it.`);
    if (header.texts.some((text) => text.includes("\ufffd"))) notes.push("A dotted � is a token that holds only a part of a character.");
    byId("note").textContent = notes.join(" ");
    byId("note").hidden = !notes.length;
  }

  writeText() {
    const { header, n, runs } = this.data, main = byId("text");
    this.spans = new Array(n);
    this.blocks = sentencesOf(runs[0], n);
    const pieces = document.createDocumentFragment();
    for (const s of this.blocks) {
      const body = make("div", { className: "body" });
      for (let p = s.first; p <= s.last; p++) {
        const text = header.texts[p], span = document.createElement("span");
        span.textContent = visible(text, p === s.last);
        span.at = p;
        span.extra = text.includes("\ufffd") ? " part" : "";
        this.spans[p] = span;
        body.append(span);
      }
      const kind = s.last < header.n_prompt ? "prompt" : !s.number ? "" : s.thought ? "re-check" : "";
      const margin = make("div", { className: "margin" },
        make("span", { className: "number", textContent: s.number || "…" }),
        make("span", { className: "kind " + kind, textContent: kind }),
        make("span", { className: "lambda", textContent: s.lambda > 0 ? (this.two ? "λ a " : "λ ") + s.lambda.toFixed(2) : "" }));
      margin.title = s.number ? `sentence ${s.number}: ${s.thought ? "re-checking" : "execution"}, λ ${s.lambda}` : "not finished";
      s.node = make("div", { className: "sentence" + (s.thought ? " check" : "") }, margin, body);
      s.node.sentence = s;
      pieces.append(s.node);
    }
    main.append(pieces);
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
    } else {
      entries.push(["k0", n > 1 ? "none" : "dropped"]);
      if (n === 1) entries.push(["k8", "held"]);
      const counts = new Map();
      for (let c = 1; n > 1 && c <= n; c++) counts.set(levelOf(c, n), [...(counts.get(levelOf(c, n)) || []), c]);
      for (const [level, of] of counts) {
        const range = of.length > 1 ? `${of[0]}–${of.at(-1)}` : `${of[0]}`;
        entries.push(["k" + level, of.at(-1) === n ? (of.length > 1 ? range : `all ${n}`) : range]);
      }
    }
    entries.push(["later", "not written yet"]);
    legend(this.shown === "" ? "A token is held" : n > 1 ? `Heads that hold a token, of ${n}:` : "A token is", entries);
  }

  paint() {
    const { data, chosen, frame, counts } = this, n = data.n, of = chosen.length, upto = data.fed[frame];
    data.runs.forEach((run, i) => countHeld(data, run, chosen, frame, counts[i]));
    if (this.two) countBoth(data, data.runs[0], data.runs[1], chosen, frame, counts[2]);
    const [a, b] = counts, single = this.shown === "" ? null : counts[Number(this.shown)];
    const k0 = code("k0"), both = code("both"), a1 = code("a1"), b1 = code("b1");
    const levels = Array.from({ length: of + 1 }, (_, c) => k0 + levelOf(c, of));
    for (let p = 0; p < n; p++) {
      let now = 0;
      if (p >= upto) now = 0;
      else if (single) now = levels[single[p]];
      else if (a[p] === b[p]) now = a[p] ? both : k0;
      else now = (a[p] > b[p] ? a1 : b1) + strength(a[p] - b[p], of) - 1;
      this.codes[p] = now;
    }
    this.near.forEach((s) => this.paintSentence(s));
    this.writeState();
    if (this.at != null && !this.tip.node.hidden) this.inspect(this.at, false);
    if (this.strips && this.strips.width) {
      this.strips.setStep(upto);
      this.paintStrip();
    }
  }

  // The strip's column: the mean level of its positions, or the difference that most of them show.
  paintStrip() {
    const k0 = code("k0");
    this.strips.setStep(this.data.fed[this.frame]);
    this.strips.setHeld((from, to) => {
      const seen = this.codes.subarray(from, Math.min(to, this.data.fed[this.frame]));
      if (!seen.length) return "";
      if (this.shown !== "") return theme.get(CLASSES[Math.round(seen.reduce((sum, c) => sum + c, 0) / seen.length)]);
      const votes = new Uint16Array(CLASSES.length);
      for (const c of seen) votes[c]++;
      const most = votes.indexOf(Math.max(...votes));
      return theme.get(CLASSES[most < 0 ? k0 : most]);
    });
  }

  writeState() {
    const { data, frame, chosen, counts } = this, fed = data.fed[frame], total = data.frames - 1;
    const where = !total ? `nothing was compacted, ${number(fed)} tokens fed`
      : frame ? `after compaction ${frame} of ${total}, ${number(fed)} tokens fed` : `before the first of ${total} compactions, ${number(fed)} tokens fed`;
    const sums = counts.map((list) => list.reduce((sum, c) => sum + c, 0));
    const slots = fed * chosen.length, share = (x) => (slots ? Math.round((100 * x) / slots) : 0) + " %";
    let held;
    if (this.two) {
      const [a, b, both] = sums;
      held = `${plural(slots, "slot")} of ${plural(chosen.length, "head")}: both hold ${number(both)} (${share(both)}), only a ${number(a - both)} (${share(a - both)}), only b ${number(b - both)} (${share(b - both)}), neither ${number(slots - a - b + both)} (${share(slots - a - b + both)})`;
    } else {
      held = `${chosen.length > 1 ? `each of ${number(chosen.length)} heads holds ` + number(sums[0] / chosen.length) + (sums[0] % chosen.length ? " on average" : "") : "the head holds " + number(sums[0])} of ${number(fed)} (${share(sums[0])})`;
      const size = data.runs[0].bytes.find((pair) => pair[0] === fed);
      if (size && frame) held += `, the whole cache takes ${amount(size[1], "bytes")}`;
    }
    byId("state").textContent = where[0].toUpperCase() + where.slice(1) + ": " + held + ".";
    byId("frame").setAttribute("aria-valuetext", where);
  }

  // Scrolls the text to a position and tells about it.
  goTo(position) {
    this.spans[position].scrollIntoView({ block: "center" });
    this.inspect(position, true);
  }

  inspect(position, speak) {
    const span = this.spans[position], box = span.getBoundingClientRect();
    this.focus(position);
    this.pinned ||= speak;
    const text = this.tip.show(position, this, box.left, box.bottom, 4);
    if (speak) byId("spoken").textContent = text;
  }

  focus(position) {
    if (this.at !== undefined && this.at !== null) this.spans[this.at].classList.remove("here");
    this.at = position;
    if (position !== null) this.spans[position].classList.add("here");
    this.strips.setMark(position);
  }

  listen() {
    const main = byId("text"), slider = byId("frame");
    let due = 0;
    slider.addEventListener("input", () => {
      cancelAnimationFrame(due);
      due = requestAnimationFrame(() => this.moveTo(Number(slider.value)));
    });
    // Inside a report the pages beside this one follow, and this one follows them.
    addEventListener("message", ({ source, data }) => {
      if (source === parent && source !== window && data && Number.isInteger(data.skipkvStep)) this.setFrame(this.data.header.steps.filter((step) => step <= data.skipkvStep).length);
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
    main.addEventListener("pointerleave", () => this.leave());
    main.addEventListener("scroll", () => this.scrolled());
    main.addEventListener("blur", () => this.leave());
    main.addEventListener("keydown", (event) => this.key(event));
    byId("play").addEventListener("click", () => this.play());
  }

  leave() {
    this.tip.hide();
    this.focus(null);
  }

  // What a key or a click on a strip told about was scrolled into view by that, and its tooltip goes along.
  scrolled() {
    const area = byId("text").getBoundingClientRect(), box = this.at != null && this.spans[this.at].getBoundingClientRect();
    if (this.pinned && box && box.bottom > area.top && box.top < area.bottom) this.inspect(this.at, false);
    else this.tip.hide();
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

  moveTo(frame) {
    this.setFrame(frame);
    if (parent !== window) parent.postMessage({ skipkvStep: frame && this.data.header.steps[frame - 1] }, "*");
  }

  setFrame(frame) {
    this.frame = frame;
    byId("frame").value = frame;
    this.paint();
  }

  play() {
    const button = byId("play"), total = this.data.frames;
    const stop = () => {
      clearInterval(this.timer);
      this.timer = 0;
      button.textContent = "▶";
      button.setAttribute("aria-label", "Play the compactions");
    };
    if (this.timer) return stop();
    button.textContent = "⏸";
    button.setAttribute("aria-label", "Stop");
    if (this.frame === total - 1) this.moveTo(0);
    this.timer = setInterval(() => (this.frame < total - 1 ? this.moveTo(this.frame + 1) : stop()), Math.max(60, Math.min(500, 12000 / total)));
  }
}

unpack(byId("data").textContent).then(
  (data) => (window.view = new TextView(data)),
  (error) => (byId("state").textContent = "This browser cannot read the page's data: " + error),
);
