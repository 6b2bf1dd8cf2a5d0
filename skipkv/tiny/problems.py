"""The problems of the tiny reasoner, how it is taught to reason about them, and its tokenizer.

Prompt:  shuffled facts, "Kim = Dan + pears." "Dan = 4." "pears = 9." (arithmetic modulo 10), then "Find Kim."
Trace:   1. plan, backwards from the target   "Now, Kim = Dan + pears, so find Dan."
         2. compute, forwards again           "Then, Kim = Dan (4) + pears (9), giving Kim (3)."
         each followed by idle re-checks that repeat it word for word but for its first two words:
         "Wait, …"  "Wait again …"  "Alternatively again …"  "Alternatively, …"
         A prompt that says "Find Kim briefly." asks for fewer: "Now briefly …", then "Wait briefly …" and
         "Alternatively briefly …".

Tokens are whole pieces of text (" Kim =", " + pears", " (4)", ".\\n\\n"), so that what is looked up stands right
behind the token that asks for it, and the sentences of a phase are equally long, so that everything local stands at a
fixed distance. How many re-checks follow is a rule of the step, so that greedy decoding produces them; each decision
is broken with probability `slips`, so that the model also learns to go on with or without one. The facts stand on one
line: as sentences of their own they would resemble each other enough to be flagged as repeats.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

NAMES = (
    "Ann Bob Cid Dan Eve Fay Gus Hal Ida Jim Kim Leo Mia Ned Oda Pam Ray Sam Tom Uma Val Wes Xia Yan Zoe "
    "Abe Bea Cal Dot Eli Flo Gil"
).split()
THINGS = "pears plums figs nuts peas beans eggs cups pens pins keys maps hats caps toys coins".split()
PAD, BOS, EOS, USER, ASSISTANT = "<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"
STARTS = ["First", "Now", "Then", "Wait", "Alternatively"]
BRIEFLY = " briefly"
WORDS = (
    [PAD, BOS, EOS, USER, ASSISTANT, "<think>", "</think>", "\n", "\n\n", ".", ".\n\n", ",", "Find", *STARTS]
    + [" again", BRIEFLY, " so", " find", " giving", "\\boxed{", "}"]
    + [form.format(digit) for form in (" {}", " ({})", "{}") for digit in range(10)]
    + [f" {name}" for name in NAMES]
    + [f" {x} =" for x in NAMES + THINGS]
    + [f" {sign} {x}" for sign in "+-" for x in NAMES + THINGS]
)
IDS = {word: i for i, word in enumerate(WORDS)}
FOREVER = 1 << 20  # a token that is needed to the end

# What a sentence begins with when it is said first (None: the word of its phase), said again, and so on.
THOROUGH = ((None, ","), ("Wait", ","), ("Wait", " again"), ("Alternatively", " again"), ("Alternatively", ","))
BRIEF = ((None, BRIEFLY), ("Wait", BRIEFLY), ("Alternatively", BRIEFLY))


@dataclass(frozen=True)
class Level:
    """How hard problems are.

    Attributes
    ----------
    steps : (int, int)
        Fewest and most steps from the base fact to the target.
    distract : float
        Facts about names that lead nowhere, per step.
    things : float
        Constants per step (at least three).
    two_names : float
        Share of the later facts that need two names.
    early : float
        Share of those whose second name is one of the first three steps, stated long before.
    brief : float
        Share of the problems that ask for few re-checks: 1 or 2 a sentence in place of 2 to 4.
    slips : float
        Probability that a re-check is left out or added, in training.
    """

    steps: tuple[int, int] = (4, 8)
    distract: float = 0.2
    things: float = 0.5
    two_names: float = 0.2
    early: float = 0.5
    brief: float = 0.0
    slips: float = 0.05


@dataclass(frozen=True)
class Problem:
    """One problem with the trace to learn; tokens are words of `WORDS`.

    Attributes
    ----------
    prompt, trace : list of str
    answer : str
    needed : list of int
        For each token, up to which position it is needed: the end of the next copy of its sentence or, after the last
        copy, of the sentence that uses it; `FOREVER` where that is not known.
    """

    prompt: list[str]
    trace: list[str]
    answer: str
    needed: list[int]


@dataclass(frozen=True)
class _Fact:
    """``x = first`` or ``x = first sign second``."""

    first: str
    sign: str = ""
    second: str = ""

    def words(self, x: str) -> list[str]:
        return [f" {x} =", f" {self.first}"] + ([f" {self.sign} {self.second}"] if self.sign else [])


def _facts(rng: random.Random, chain: list[str], things: list[str], level: Level) -> dict[str, _Fact]:
    facts = {chain[0]: _Fact(str(rng.randrange(10)))}
    for i in range(1, len(chain)):
        second = rng.choice(things)
        if i >= 3 and rng.random() < level.two_names:
            last = min(3, i - 2) if rng.random() < level.early else i - 2
            second = chain[rng.randint(1, last)]
        facts[chain[i]] = _Fact(chain[i - 1], rng.choice("+-"), second)
    return facts


def problem(rng: random.Random, level: Level) -> Problem:
    """Draw one problem."""
    steps = rng.randint(*level.steps)
    names = rng.sample(NAMES, min(len(NAMES), steps + 1 + round(steps * level.distract)))
    chain, others = names[: steps + 1], names[steps + 1 :]
    things = rng.sample(THINGS, min(len(THINGS), max(3, round(steps * level.things))))
    facts = {thing: _Fact(str(rng.randrange(10))) for thing in things}
    facts |= _facts(rng, chain, things, level)
    if others:
        facts |= _facts(rng, others, things, level)
    begins = BRIEF if rng.random() < level.brief else THOROUGH
    ask = [BRIEFLY] if begins is BRIEF else []

    spans = []  # ((phase, subject), first token, end) of every fact and sentence
    prompt = [BOS, USER]
    for subject in rng.sample(list(facts), len(facts)):
        words = facts[subject].words(subject)
        spans.append((("fact", subject), len(prompt), len(prompt) + len(words) + 1))
        prompt += [*words, "."]
    prompt += ["Find", f" {chain[-1]}", *ask, ".", ASSISTANT, "<think>", "\n"]
    trace = ["First", " find", f" {chain[-1]}", ".\n\n"]

    def say(phase: str, subject: str, body: list[str], rechecks: int) -> None:
        for k, (word, second) in enumerate(begins):
            if k and (k <= rechecks) == (rng.random() < level.slips):
                break
            first = len(prompt) + len(trace)
            trace.extend([word or ("Then" if phase == "compute" else "Now"), second, *body, ".\n\n"])
            spans.append(((phase, subject), first, len(prompt) + len(trace)))

    fewer = begins is BRIEF
    for x in reversed(chain[1:]):
        rechecks = 1 + (facts[x].sign == "-") + (not fewer)
        say("plan", x, [*facts[x].words(x), ",", " so", " find", f" {facts[x].first}"], rechecks)
    value = {thing: int(facts[thing].first) for thing in [*things, chain[0]]}
    base = chain[0]
    start = len(trace)
    trace += ["Now", begins[0][1], *facts[base].words(base), ",", " giving", f" {base}", f" ({value[base]})", ".\n\n"]
    spans.append((("compute", base), len(prompt) + start, len(prompt) + len(trace)))
    for x in chain[1:]:
        first, sign, second = facts[x].first, facts[x].sign, facts[x].second
        v = value[x] = (value[first] + (1 if sign == "+" else -1) * value[second]) % 10
        operands = [f" {first}", f" ({value[first]})", f" {sign} {second}", f" ({value[second]})"]
        rechecks = 1 + v // 5 if fewer else 2 + v // 4
        say("compute", x, [f" {x} =", *operands, ",", " giving", f" {x}", f" ({v})"], rechecks)
    trace += ["</think>", "\n\n", "\\boxed{", str(v), "}", EOS]

    needed = [FOREVER] * (len(prompt) + len(trace))
    said = {}  # where each fact, plan and computation is first said to the end
    for what, _, end in spans:
        said.setdefault(what, end)
    user = {
        y: x for x in chain[1:] for y in (facts[x].first, facts[x].second) if y in chain
    }  # the last step that uses y
    after: dict[tuple[str, str], int] = {}  # end of the copy that follows
    for what, begin, end in reversed(spans):
        phase, x = what
        if phase == "fact":
            use = said.get(("plan", x), said.get(("compute", x)))
        else:
            use = said.get(("compute", x if phase == "plan" else user.get(x, "")))
        until = after.get(what, use)
        if until is not None:
            needed[begin:end] = [until] * (end - begin)
        after[what] = end
    return Problem(prompt, trace, str(v), needed)


def stream(seed: str, level: Level) -> Iterator[Problem]:
    """Endless problems. Streams of different seeds have nothing in common."""
    rng = random.Random(f"skipkv.tiny {seed}")
    while True:
        yield problem(rng, level)


def draw(count: int, seed: str = "held-out", level: Level | None = None) -> list[dict[str, str]]:
    """The first problems of a stream: ``prompt`` and ``answer``.

    Training draws from streams named ``train …``; no choice was ever made on ``held-out``.
    """
    source = stream(seed, level or Level())
    return [{"prompt": "".join(p.prompt), "answer": p.answer} for p in (next(source) for _ in range(count))]


def encode(words: list[str]) -> list[int]:
    return [IDS[word] for word in words]


def parts(word: str) -> tuple[str, list[str]]:
    """What a token is about and the forms it has: " Kim", " Kim =" and " + Kim" are all about "Kim"."""
    bare = word.replace("(", " ").replace(")", " ").split()
    core = next((c for c in bare if c in NAMES or c in THINGS or c.isdigit()), None)
    if core is None:
        return word, ["word"]
    kind = "name" if core in NAMES else "thing" if core in THINGS else "digit"
    if word.endswith("="):
        return core, [kind, "="]
    if "(" in word:
        return core, [kind, "("]
    if word[1:2] in ("+", "-"):
        return core, [kind, word[1], "op"]
    return core, [kind, "bare" if word[0] == " " else "box"]


def tokenizer() -> Any:
    """The vocabulary as a `tokenizers.Tokenizer`: one regex split, one word a piece, exact round trip."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.WordLevel(IDS, unk_token=PAD))
    pattern = r"\\boxed\{|\}|\.?\n\n|\n|\.|,| [+\-] [A-Za-z]+| [A-Za-z]+ =| ?[A-Za-z]+| \([0-9]\)| ?[0-9]"
    made.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in (BOS, EOS, USER, ASSISTANT, PAD)])
    made.add_tokens([AddedToken(s, special=False, normalized=False) for s in ("<think>", "</think>")])
    return made


if __name__ == "__main__":
    import argparse

    ap = argparse.ArgumentParser(prog="python -m skipkv.tiny.problems", description="Problems as JSON lines.")
    ap.add_argument("count", type=int)
    ap.add_argument("seed", help="the stream's name: held-out, choose, calibration, …")
    args = ap.parse_args()
    for drawn in draw(args.count, args.seed):
        print(json.dumps(drawn))
