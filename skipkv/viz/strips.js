// Strips over the positions of the text, all on one axis: held, label, λ, α, and the cache over steps.
//
//   position p → p / n of the width; a step is the number of tokens fed, so it has the same axis

class Strips {
  // place: element; onPick(position) on a click, null for a page without text to pick from
  constructor(place, data, onPick) {
    Object.assign(this, { place, data, onPick });
    const { runs } = data, all = runs[0].sentences, checks = all.filter((s) => s.thought).length;
    if (onPick) this.held = this.add("held", "held", "as the text below", "Heads that hold each position, as in the text below", "canvas");
    const label = this.add("label", "label", "hatched: re-checking", `${plural(all.length, "sentence")}, ${checks} of re-checking (tall, hatched); execution is low`);
    for (const s of all) this.bar(label, s.last < data.header.n_prompt ? "prompt" : s.thought ? "check" : "work", s.first, s.last, s.thought ? 1 : 0.5);
    runs.forEach((run, i) => {
      const name = runs.length > 1 ? " " + "ab"[i] : "", flagged = run.sentences.filter((s) => s.lambda > 0);
      if (flagged.length) {
        const most = Math.max(...flagged.map((s) => s.lambda)), share = `${flagged.length} of ${run.sentences.length} are repeated, at most ${most.toFixed(2)}`;
        const lambda = this.add("lambda", "λ" + name, "0 to 1, repeated later", "λ: similarity of a sentence with a later one that repeats it; " + share);
        for (const s of flagged) this.bar(lambda, "lambda", s.first, s.last, Math.min(1, s.lambda));
      }
      if (run.alphas.size) {
        const most = Math.max(...[...run.alphas.values()].map(Math.abs)) || 1;
        const alpha = this.add("alpha", "α" + name, `to ${most.toFixed(2)}, steering`, `α of ${plural(run.alphas.size, "steered token")}`);
        for (const [position, value] of run.alphas) this.bar(alpha, "alpha", position, position, (0.86 * Math.abs(value)) / most);
      }
    });
    this.addCache();
    this.addAxis();
    [this.now, this.mark] = ["now", "mark"].map((className) => make("div", { className, hidden: true }));
    place.append(this.now, this.mark);
  }

  // A strip with its name and scale.
  add(kind, title, scale, label, tag = "div") {
    const strip = picture(tag, label, { className: "strip " + kind });
    this.place.append(make("span", { className: "name", textContent: title, title: label }), strip, make("span", { className: "scale", textContent: scale }));
    strip.addEventListener("click", (event) => {
      const { left, width } = strip.getBoundingClientRect(), { n } = this.data;
      if (this.onPick) this.onPick(Math.max(0, Math.min(n - 1, Math.floor(((event.clientX - left) / width) * n))));
    });
    return strip;
  }

  // A bar over some positions, whose height is a share of the strip's.
  bar(strip, kind, first, last, height) {
    const { n } = this.data, width = percent(last + 1 - first, n);
    strip.append(make("i", { className: kind, style: `left: ${percent(first, n)}; width: max(0.7px, ${width} - 1px); height: ${100 * height}%` }));
  }

  addCache() {
    const { runs, n } = this.data, { full, unit } = runs[0].cache;
    const most = [full, ...runs.map((run) => run.cache.points)].flat().reduce((most, point) => Math.max(most, point[1]), 1);
    const what = `${unit === "bytes" ? "Bytes" : "Slots"} of the cache (all heads) over tokens fed; dashed: a cache that drops nothing`;
    const line = (points, kind) => `<polyline class="${kind}" points="${points.map(([step, value]) => `${step},${most - value}`).join(" ")}"/>`;
    const lines = runs.map((run, i) => line(run.cache.points, runs.length > 1 ? "ab"[i] : ""));
    const strip = this.add("cache", "cache", `to ${amount(most, unit)}, dashed: full`, what);
    strip.innerHTML = `<svg viewBox="0 0 ${n} ${most}" preserveAspectRatio="none">${line(full, "full")}${lines.join("")}</svg>`;
  }

  addAxis() {
    const { n } = this.data, strip = this.add("axis", "position", "of " + number(n), "Axis: position, and tokens fed");
    const rough = Math.max(1, n / 8), power = 10 ** Math.floor(Math.log10(rough)), gap = power * [1, 2, 5, 10].find((k) => k * power >= rough);
    for (let p = 0; p <= n; p += gap) strip.append(make("span", { textContent: p < 0.94 * n ? number(p) : "", style: `left: ${percent(p, n)}` }));
  }

  setStep(step) {
    this.now.hidden = false;
    this.now.style.left = percent(step, this.data.n);
  }

  setMark(position) {
    this.mark.hidden = position === null;
    this.mark.style.left = percent(position + 0.5, this.data.n);
  }
}
