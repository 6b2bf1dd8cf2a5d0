// What the tests of the pages read off a page that has drawn itself: evaluated in its frame, then called as probe.….

window.probe = (() => {
  const all = (selector, of = document) => [...of.querySelectorAll(selector)];
  const style = (element) => getComputedStyle(element);

  // A canvas's colours by place, [r, g, b, a]; of a copy, as Chromium warns where a page's own canvas is read again.
  const pixels = (canvas) => {
    const { width, height } = canvas;
    const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    context.drawImage(canvas, 0, 0);
    const { data } = context.getImageData(0, 0, width, height);
    return (x, y) => [...data.subarray(4 * (Math.floor(y) * width + Math.floor(x))).subarray(0, 4)];
  };

  const tokens = () => all("#text .body > span");
  const swatches = () => all("#legend .entry").map((entry) => [entry.firstChild, entry.lastChild.textContent]);
  const painted = (element, kind) => [kind, style(element).backgroundColor, style(element).color];

  const rgb = (colour) => {
    const [r, g, b, a] = colour.match(/[\d.]+/g).map(Number);
    return [r, g, b, a ?? 1];
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((x, i) => x * a + below[i] * (1 - a));
  // Relative luminance as WCAG 2 defines it.
  const linear = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  const luminance = (colour) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => sum + weight * linear(colour[i] / 255), 0);

  return {
    drawn: () => tokens().length > 0 && tokens().every((token) => token.className),
    texts: (selector) => all(selector).map((element) => element.textContent),
    cells: (selector) => all(selector).filter((row) => row.checkVisibility({ contentVisibilityAuto: true })).map((row) => [...row.cells].map((cell) => cell.textContent)),
    elements: () => all("*").map((element) => element.tagName),

    // Class, background and ink of every token and of the legend; the controls.
    look: () => ({
      tokens: tokens().map((token) => painted(token, token.classList[0] ?? "")),
      swatches: swatches().map(([swatch]) => painted(swatch, swatch.classList[1])),
      legend: swatches().map(([swatch, label]) => [swatch.classList[1], label]),
      name: document.querySelector(".legend-name").textContent,
      state: byId("state").textContent,
      frames: [Number(byId("frame").value), view.frame],
      paper: style(document.body).backgroundColor,
      font: style(tokens()[0]).font,
    }),

    // Position and class of the tokens that can be seen.
    near: () => {
      const box = byId("text").getBoundingClientRect();
      const seen = (element) => element.getBoundingClientRect().bottom > box.top && element.getBoundingClientRect().top < box.bottom;
      return all(".sentence").filter(seen).flatMap((s) => all(".body > span", s).filter(seen)).map((token) => [token.at, token.classList[0] ?? ""]);
    },
    visible: (position) => {
      const box = view.spans[position].getBoundingClientRect(), area = byId("text").getBoundingClientRect();
      return box.top >= area.top && box.bottom <= area.bottom;
    },
    marked: () => view.spans.flatMap((token, p) => (token.classList.contains("here") ? [p] : [])),

    // The colour in the middle of each position's part of the strip.
    strip: () => {
      const canvas = document.querySelector(".strip.held"), n = view.data.n, at = pixels(canvas);
      return Array.from({ length: n }, (_, p) => {
        const [r, g, b, a] = at(((p + 0.5) * canvas.width) / n, canvas.height / 2);
        return a ? `rgb(${r}, ${g}, ${b})` : "rgba(0, 0, 0, 0)";
      });
    },

    // How high the cache's line of one colour is in the middle of each position's part, null where it is not seen.
    cache: (name) => {
      const canvas = document.querySelector(".strip.cache"), { width, height } = canvas, n = view.data.n, at = pixels(canvas);
      const like = ([r, g, b, a]) => a > 100 && Math.hypot(...[r, g, b].map((x, i) => x - theme.rgb(name)[i])) < 60;
      return Array.from({ length: n }, (_, p) => {
        const seen = Array.from({ length: height }, (_, y) => y).filter((y) => like(at(((p + 0.5) * width) / n, y)));
        return seen.length ? height - 0.5 - seen.reduce((sum, y) => sum + y, 0) / seen.length : null;
      });
    },

    // The colour in the middle of each cell of each map: [maps][frames][positions].
    maps: () => all(".map canvas").map((canvas) => {
      const at = pixels(canvas), { n, frames } = view.data;
      const cell = (p, f) => at(((p + 0.5) * canvas.width) / n, ((f + 0.5) * canvas.height) / frames).slice(0, 3);
      return Array.from({ length: frames }, (_, f) => Array.from({ length: n }, (_, p) => `rgb(${cell(p, f).join(", ")})`));
    }),

    // The tooltip; squares [runs][layers][heads]: whether each run's part of a head's square is filled.
    tip: () => {
      const tip = byId("tip"), canvas = tip.querySelector("canvas"), box = tip.getBoundingClientRect();
      const { header, runs } = view.data;
      const cell = canvas ? canvas.width / header.layers.length : 0, at = canvas && pixels(canvas);
      const filled = (l, k, i) => at(2 + l * cell + ((cell - 4) * (i + 0.5)) / runs.length, (k + 0.5) * cell)[3] > 0;
      return {
        hidden: tip.hidden,
        inside: box.left >= 0 && box.top >= 0 && box.right <= innerWidth && box.bottom <= innerHeight,
        code: tip.querySelector("code")?.textContent,
        lines: all("div:not(.grid)", tip).map((line) => line.textContent),
        rows: Object.fromEntries(all("tr", tip).map((row) => [...row.cells].map((c) => c.textContent))),
        squares: canvas && runs.map((_, i) => header.layers.map((_, l) => header.heads.map((_, k) => filled(l, k, i)))),
        elements: all("*", tip).map((element) => element.tagName),
      };
    },

    // Every text that is shown: its contrast (WCAG 2), its boxes, whether they are inside something that scrolls sideways.
    shown: () => {
      const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
      while (walker.nextNode()) {
        const node = walker.currentNode, element = node.parentElement, range = document.createRange();
        range.selectNodeContents(node);
        const boxes = [...range.getClientRects()].filter((box) => box.width > 0 && box.height > 0);
        if (!node.textContent.trim() || !boxes.length || element.closest("script, style, option, title, .hidden, [hidden]")) continue;
        if (!element.checkVisibility({ contentVisibilityAuto: true })) continue;
        const chain = [];
        for (let e = element; e; e = e.parentElement) chain.unshift(style(e));
        const ground = chain.reduce((below, s) => over(rgb(s.backgroundColor), below), [255, 255, 255]);
        const ink = rgb(element.closest("svg") ? style(element).fill : style(element).color);
        ink[3] *= chain.reduce((product, s) => product * Number(s.opacity), 1);
        const [low, high] = [luminance(ground), luminance(over(ink, ground))].sort((a, b) => a - b);
        found.push({
          text: node.textContent.trim(),
          kinds: String(element.className.baseVal ?? element.className).split(" "),
          contrast: (high + 0.05) / (low + 0.05),
          colours: [ground, over(ink, ground)].map((colour) => colour.map(Math.round).join()),
          scrolls: chain.slice(2).some((s) => ["auto", "scroll"].includes(s.overflowX)),
          boxes: boxes.map((box) => [box.left, box.top, box.right, box.bottom]),
        });
      }
      return found;
    },
  };
})();
