// The data block → arrays → what a head holds.
//
//   base64 → zlib → [header's bytes as uint32][header][arrays as the header lists them]
//   ages [heads, n] → ends [heads, n]: the frame in which a slot is gone, `never` if none
//
// Frame 0 is before the first compaction, frame f after the one at steps[f - 1]. A head holds position p in frame f
// if p < fed[f] and ends > f.

const KINDS = { uint8: Uint8Array, uint16: Uint16Array, int32: Int32Array, float32: Float32Array };

async function unpack(base64) {
  const bytes = Uint8Array.from(atob(base64.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const arrays = {};
  let at = 4 + length;
  for (const [name, kind, size] of header.arrays) {
    const end = at + size * KINDS[kind].BYTES_PER_ELEMENT;
    arrays[name] = new KINDS[kind](buffer.slice(at, end)); // a copy, as views must be aligned
    at = end;
  }
  return prepare(header, arrays);
}

// {header, n, frames, fed, runs: [{ends, never, sentences, blocks, alphas, scores, …}]}
function prepare(header, arrays) {
  const n = header.texts.length, { steps } = header;
  let passed = 0;
  const met = header.texts.map((_, p) => {
    while (steps[passed] <= p) passed++;
    return passed;
  });
  const runs = header.traces.map((trace, i) => {
    const ends = arrays["ages" + i], never = ends.BYTES_PER_ELEMENT === 1 ? 255 : 65535;
    for (let at = 0; at < ends.length; at++) ends[at] = ends[at] ? met[at % n] + ends[at] : never;
    const sentences = trace.sentences.map(([first, last, thought, lambda, repeats], k) => ({ first, last, thought, lambda, repeats, number: k + 1 }));
    return { ...trace, ends, never, sentences, blocks: blocksOf(sentences, n), alphas: new Map(trace.alphas), scores: scoreTable(header, arrays, i) };
  });
  return { header, n, frames: steps.length + 1, fed: [steps[0] ?? n, ...steps], runs };
}

// Sentences and, as number 0, what is before, between and after them: every position is in one.
function blocksOf(sentences, n) {
  const found = [];
  for (const s of [...sentences, { first: n }]) {
    const first = found.length ? found.at(-1).last + 1 : 0;
    if (first < s.first) found.push({ first, last: s.first - 1, thought: 0, lambda: 0, repeats: 0, number: 0 });
    if (s.number) found.push(s);
  }
  return found;
}

// Counts, into out [n], the chosen heads that hold each position in all these runs (one or two); how many each head holds.
function countHeld(data, runs, chosen, frame, out) {
  out.fill(0);
  return chosen.map((h) => {
    const [a, b = a] = runs.map((run) => run.ends.subarray(h * data.n, (h + 1) * data.n));
    let held = 0;
    for (let p = 0; p < data.fed[frame]; p++)
      if (a[p] > frame && b[p] > frame) {
        out[p]++;
        held++;
      }
    return held;
  });
}

// Positions that a head holds, ascending.
function heldPositions(data, run, head, frame, upto = data.fed[frame]) {
  const found = [];
  for (let p = 0; p < upto; p++) if (run.ends[head * data.n + p] > frame) found.push(p);
  return found;
}

// "frame,head" → {size, values: name → function of a candidate's place}; null where no scores are.
function scoreTable(header, arrays, i) {
  const names = header.scores?.[i] ?? [], table = new Map(), top = 2 ** header.bits - 1;
  if (!names.length) return null;
  const [index, bounds, codes] = ["index", "bounds", "codes"].map((name) => arrays[name + i]);
  for (let k = 0, at = 0, bound = 0; k < index.length; k += 3) {
    const [frame, head, size] = index.subarray(k), values = {};
    for (const name of names) {
      const part = codes.subarray(at, (at += size)), [low, high] = bounds.subarray(bound, (bound += 2));
      values[name] = (c) => (part[c] === top ? NaN : low + ((high - low) * part[c]) / (top - 1));
    }
    table.set(frame + "," + head, { size, values });
  }
  return table;
}

// The scores of one position at the compaction that made this frame; null where it was no candidate or nothing is recorded.
function scoresAt(data, run, head, frame, position) {
  const entry = run.scores && run.scores.get(frame + "," + head);
  if (!entry) return null;
  const { size, values } = entry; // candidates are the oldest slots held before
  const place = heldPositions(data, run, head, frame - 1, data.fed[frame]).indexOf(position);
  if (place < 0 || place >= size) return null;
  const found = { size };
  for (const name in values) found[name] = values[name](place);
  if (values.score) found.rank = 1 + Array.from({ length: size }, (_, c) => values.score(c)).filter((score) => score > found.score).length;
  return found;
}

// A token's text with what cannot be seen made visible; `ends`: it closes a sentence, whose block is its line break.
function visible(text, ends) {
  if (text === "") return "∅";
  const shown = text
    .replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/[\u007f-\u009f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]/gu, (c) => "⟨U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩")
    .replace(/\t/g, "⇥\t")
    .replace(/\n/g, "⏎\n");
  return ends ? shown.replace(/\n(?=(⏎\n)*$)/g, "") : shown;
}
