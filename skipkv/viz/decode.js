// The data block → arrays → what a head holds.
//
//   base64 → zlib → [header's bytes as uint32][header][arrays as the header lists them]
//   ages [heads, n] + births [n] → ends [heads, n]: the frame in which a slot is gone, NEVER if none
//
// Frame 0 is before the first compaction, frame f after the one at steps[f - 1]. A head holds position p in frame f
// if p < fed[f] and ends > f. No DOM here: tests run this file by itself.

const KINDS = { uint8: Uint8Array, uint16: Uint16Array, int32: Int32Array, float32: Float32Array };

async function unpack(base64) {
  const raw = atob(base64.trim());
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const arrays = {};
  let at = 4 + length;
  for (const [name, kind, size] of header.arrays) {
    const bytes = size * KINDS[kind].BYTES_PER_ELEMENT;
    arrays[name] = new KINDS[kind](buffer.slice(at, at + bytes)); // a copy, as views must be aligned
    at += bytes;
  }
  return prepare(header, arrays);
}

// {header, n, frames, fed, runs: [{ends, never, at, scores}]}
function prepare(header, arrays) {
  const n = header.texts.length, steps = header.steps, frames = steps.length + 1;
  const fed = [steps.length ? steps[0] : n, ...steps];
  const born = new Uint16Array(n);
  for (let p = 0, f = 1; p < n; p++) {
    while (f <= steps.length && steps[f - 1] <= p) f++;
    born[p] = f;
  }
  const runs = header.traces.map((trace, i) => {
    const ends = arrays["ages" + i];
    const never = ends.BYTES_PER_ELEMENT === 1 ? 255 : 65535;
    for (let at = 0; at < ends.length; at += n)
      for (let p = 0; p < n; p++) ends[at + p] = ends[at + p] ? born[p] + ends[at + p] - 1 : never;
    return { ...trace, ends, never, scores: scoreTable(header, arrays, i) };
  });
  return { header, n, frames, fed, runs };
}

// How many of the chosen heads hold each position; out [n].
function countHeld(data, run, chosen, frame, out) {
  const { n, fed } = data, upto = fed[frame];
  out.fill(0);
  for (const h of chosen) {
    const ends = run.ends.subarray(h * n, h * n + upto);
    for (let p = 0; p < upto; p++) if (ends[p] > frame) out[p]++;
  }
}

// How many of the chosen heads hold each position in both runs; out [n].
function countBoth(data, a, b, chosen, frame, out) {
  const { n, fed } = data, upto = fed[frame];
  out.fill(0);
  for (const h of chosen) {
    const x = a.ends.subarray(h * n, h * n + upto), y = b.ends.subarray(h * n, h * n + upto);
    for (let p = 0; p < upto; p++) if (x[p] > frame && y[p] > frame) out[p]++;
  }
}

// Positions that a head holds, ascending.
function heldPositions(data, run, head, frame) {
  const found = [];
  for (let p = 0; p < data.fed[frame]; p++) if (run.ends[head * data.n + p] > frame) found.push(p);
  return found;
}

// "frame,head" → {size, values: name → function of a candidate's place}; null where no scores are.
function scoreTable(header, arrays, i) {
  const names = header.scores ? header.scores[i] : [];
  if (!names.length) return null;
  const index = arrays["index" + i], bounds = arrays["bounds" + i], codes = arrays["codes" + i];
  const top = 2 ** header.bits - 1, table = new Map();
  for (let k = 0, at = 0; k < index.length / 3; k++) {
    const size = index[3 * k + 2], from = at;
    const values = {};
    names.forEach((name, j) => {
      const low = bounds[2 * (k * names.length + j)], high = bounds[2 * (k * names.length + j) + 1];
      values[name] = (c) => {
        const code = codes[from + j * size + c];
        return code === top ? NaN : low + ((high - low) * code) / (top - 1);
      };
    });
    table.set(index[3 * k] + "," + index[3 * k + 1], { size, names, values });
    at += names.length * size;
  }
  return table;
}

// The scores of one position at the compaction that made this frame; null where it was no candidate or nothing is recorded.
function scoresAt(data, run, head, frame, position) {
  const entry = run.scores && run.scores.get(frame + "," + head);
  if (!entry) return null;
  // Candidates are the oldest slots held before: those not gone in an earlier frame.
  let place = 0;
  const ends = run.ends.subarray(head * data.n, (head + 1) * data.n);
  if (position >= data.fed[frame] || ends[position] < frame) return null;
  for (let p = 0; p < position; p++) if (ends[p] >= frame) place++;
  if (place >= entry.size) return null;
  const found = { size: entry.size };
  for (const name of entry.names) found[name] = entry.values[name](place);
  if (entry.values.score) {
    found.rank = 1;
    for (let c = 0; c < entry.size; c++) if (entry.values.score(c) > found.score) found.rank++;
  }
  return found;
}

// Sentences and what is between and after them, in order: {first, last, number (0: not closed), thought, lambda, repeats}.
function sentencesOf(run, n) {
  const found = [];
  let at = 0;
  const gap = (upto) => {
    if (at < upto) found.push({ first: at, last: upto - 1, number: 0, thought: 0, lambda: 0, repeats: 0 });
  };
  run.sentences.forEach(([first, last, thought, lambda, repeats], i) => {
    gap(first);
    found.push({ first, last, number: i + 1, thought, lambda, repeats });
    at = last + 1;
  });
  gap(n);
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
