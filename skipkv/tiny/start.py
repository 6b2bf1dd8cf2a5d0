"""Where training starts: look-up circuits that a small network finds only after a long plateau are laid out by hand;
training then changes every weight.

Residual stream at the start, D dimensions in blocks of V = head_dim (one more in `own`):
  own    what the token is: code of its core, features of its form; and one dimension that all tokens share
  prev1, prev2   the same of the tokens one and two back, written by layer 0
  far    codes of the tokens 3 to 11 back, in what room is left, written by layer 0
  out    what the look-ups of layer 1 found; the head reads it
Layer 0: every key is one vector on the RoPE pairs that turn fast, every query that vector turned by its head's offset:
it attends exactly so far back, whatever the tokens are.
Layer 1: look-ups on the pairs that hardly turn over a trace; queries and keys are codes from different blocks. Its MLP
has one unit for each (value, value, sign), open for that triple only, that writes the result: from random rows sums
stay at chance for long, and where three sums of four can be copied from the sentence before, even open units are lost
before they learn what they mean.
Layers 2 and 3 start as the identity.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from skipkv.tiny import problems
from skipkv.tiny.network import Network

OFFSETS = [1, 2, 3, 4, 5, 6, 8, 11]  # tokens back, one a head of layer 0
NEIGHBOUR, MATCH, PREFER = 10.0, 14.0, 6.0  # logits: the neighbour against the rest, equal cores, a wanted form
STREAM = 0.5  # scale of the residual stream: the smaller, the sooner what MLPs learn counts
NOISE = 0.02
RESULT = 0.6  # what an open unit of the sums writes, times its activation of about ten
FORMS = ["word", "name", "thing", "digit", "=", "bare", "(", "box", "op", "+", "-"]


def codes(count: int, size: int, rounds: int = 300) -> Tensor:
    """Unit vectors [count, size] as far from each other as can be."""
    x = torch.randn(count, size, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(rounds):
        u = F.normalize(x, dim=-1)
        loss = ((u @ u.T).fill_diagonal_(0).clamp(min=0) ** 8).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return F.normalize(x.detach(), dim=-1)


class Layout:
    """Where things stand in the stream and in a head."""

    def __init__(self, network: Network):
        s = network.shape
        D, self.d = s.hidden_size, s.head_dim
        self.pairs = self.d // 2
        self.turn = s.rope_theta ** (-torch.arange(self.pairs) / self.pairs)  # radians a token
        self.fast = int((self.turn > 0.005).sum())  # pairs [0, fast) tell neighbours apart
        slow = int((self.turn > 0.0012).sum())  # pairs [slow, pairs) see no distance
        content = [*range(slow, self.pairs), *range(slow + self.pairs, self.d)]
        self.spare = [content[len(content) // 2 - 1], content[-1]]  # say whether a form is wanted
        self.content = [i for i in content if i not in self.spare]
        self.size = len(self.content)  # of a code
        V = self.d
        self.own, self.shared = slice(0, V), V
        self.prev1, self.prev2, self.out = (slice(i * V + 1, (i + 1) * V + 1) for i in (1, 2, 3))
        self.far = slice(4 * V + 1, D)
        self.unit = (D / 3) ** 0.5  # what core, form and the shared dimension each measure after the first norm
        # The same in layer 1, where seven more blocks share the norm.
        self.part = self.unit * (3 / (3 + 2 * 2 + len(OFFSETS) - 2)) ** 0.5

    def form(self, name: str) -> int:
        return self.size + FORMS.index(name)


@torch.no_grad()
def structure(network: Network) -> None:
    """Overwrite the network's weights with the circuits."""
    at = Layout(network)
    for block in network.layers:
        block.mlp.gate_proj.weight *= 2
        block.mlp.up_proj.weight *= 2
    for block in network.layers[:2]:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(block.self_attn, name).weight.normal_(std=NOISE)
    with torch.enable_grad():
        cores = sorted({problems.parts(word)[0] for word in problems.WORDS})
        code = dict(zip(cores, codes(len(cores), at.size), strict=True))
    code |= {str(i): torch.eye(at.size)[i] for i in range(10)}  # orthogonal, for the sums; digits are never looked up
    identity = _embed(network, at, code)
    far = _neighbours(network, at)
    _look_ups(network, at, far)
    _sums(network, at, far, code, identity)
    head = network.lm_head.weight
    head.normal_(std=NOISE)
    head[:, at.out] += 0.25 * at.unit * identity / identity.norm(dim=-1, keepdim=True)


def _embed(network: Network, at: Layout, code: dict[str, Tensor]) -> Tensor:
    identity = torch.zeros(len(problems.WORDS), at.d)
    for word, i in problems.IDS.items():
        core, forms = problems.parts(word)
        identity[i, : at.size] = code[core]
        for form in forms:
            identity[i, at.form(form)] = len(forms) ** -0.5
    E = network.embed_tokens.weight
    E.normal_(std=NOISE)
    E[:, at.own] += STREAM * at.unit * identity
    E[:, at.shared] += STREAM * at.unit
    return identity


def _neighbours(network: Network, at: Layout) -> dict[int, Tensor]:
    """Layer 0. Returns where each offset's token is found in `far` [far, head_dim]."""
    attention, d = network.layers[0].self_attn, at.d
    a = (NEIGHBOUR * d**0.5) ** 0.5 / at.unit
    eye = torch.eye(d)
    for g in range(network.shape.num_key_value_heads):
        attention.k_proj.weight[g * d : g * d + at.fast, at.shared] += a  # (1, 0) on each fast pair
        attention.v_proj.weight[g * d : (g + 1) * d, at.own] += eye * STREAM
    width = at.far.stop - at.far.start
    basis = torch.linalg.qr(torch.randn(width, width)).Q
    room = width // (len(OFFSETS) - 2)
    sent = [*range(at.size), at.form("-"), at.form("op")][:room]  # of a far token: its core, and an operator's sign
    far = {}
    for h, offset in enumerate(OFFSETS):
        angle = at.turn[: at.fast] * offset
        attention.q_proj.weight[h * d : h * d + at.fast, at.shared] += a * angle.cos()
        attention.q_proj.weight[h * d + at.pairs : h * d + at.pairs + at.fast, at.shared] -= a * angle.sin()
        write = attention.o_proj.weight[:, h * d : (h + 1) * d]
        if offset <= 2:
            write[at.prev1 if offset == 1 else at.prev2] += eye
        else:
            for j, r in enumerate(sent):
                write[at.far, r] += basis[:, (h - 2) * room + j]
        far[offset] = write[at.far].clone()
    return far


def _look_ups(network: Network, at: Layout, far: dict[int, Tensor]) -> None:
    attention, d = network.layers[1].self_attn, at.d
    match, prefer = (MATCH * d**0.5) ** 0.5 / at.part, (PREFER * d**0.5) ** 0.5 / at.part

    def want(weight: Tensor, head: int, slot: int, block: slice | None, form: str = "") -> None:
        """A spare dimension becomes 1, times a gain, for tokens of this form; without a block for all."""
        row = head * d + at.spare[slot]
        if block is None:
            weight[row, at.shared] += prefer
        else:
            weight[row, block.start + at.form(form)] += prefer * (3 if form == "op" else 2) ** 0.5

    def key(g: int, name: slice, value: slice) -> None:
        for j, row in enumerate(at.content):
            attention.k_proj.weight[g * d + row, name.start + j] += match
        attention.v_proj.weight[g * d : (g + 1) * d, value] += torch.eye(d) * STREAM * at.unit / at.part

    def query(h: int, name: slice | None = None, offset: int = 0) -> None:
        attention.q_proj.weight[h * d : (h + 1) * d].normal_(std=NOISE)
        for j, row in enumerate(at.content):
            if name is not None:
                attention.q_proj.weight[h * d + row, name.start + j] += match
            else:
                attention.q_proj.weight[h * d + row, at.far] += match * far[offset][:, j]
        attention.o_proj.weight[at.out, h * d : (h + 1) * d] += torch.eye(d)

    q, k = attention.q_proj.weight, attention.k_proj.weight
    q.normal_(std=network.shape.hidden_size**-0.5)  # heads that get no look-up stay ordinary
    # " Kim =" finds what followed it; " Kim" and " + Kim" find the digit that followed.
    key(0, at.prev1, at.own)
    want(k, 0, 0, at.own, "digit")
    want(k, 0, 1, at.prev1, "=")
    query(0, at.own)
    want(q, 0, 0, at.own, "bare")
    want(q, 0, 0, at.own, "op")
    want(q, 0, 1, at.own, "=")
    # " Kim =" " Dan" finds the operand two behind " Kim =", in a plan directly, in a computation after Dan's value.
    key(1, at.prev2, at.own)
    want(k, 1, 0, at.own, "op")
    for h, name in ((2, at.prev1), (3, at.prev2)):
        query(h, name)
        want(q, h, 0, None)
    # "giving Dan (4).\n\nThen," finds the name of which Dan is the first operand.
    key(2, at.own, at.prev1)
    want(k, 2, 0, at.prev1, "=")
    query(4, offset=4)
    want(q, 4, 0, None)


def _sums(network: Network, at: Layout, far: dict[int, Tensor], code: dict[str, Tensor], identity: Tensor) -> None:
    mlp = network.layers[1].mlp
    minus = far[4][:, at.form("-")] * 3**0.5
    gain = 6 / (at.unit * (3 / 20) ** 0.5)
    for i in range(200):
        x, y, sign = i // 20, i // 2 % 10, i % 2  # value 5 back, value 3 back, sign 4 back
        gate = mlp.gate_proj.weight[i].normal_(std=NOISE)
        triple = far[5][:, : at.size] @ code[str(x)] + far[3][:, : at.size] @ code[str(y)] + (1 if sign else -1) * minus
        gate[at.far] += gain * triple
        gate[at.shared] -= gain * (2.6 if sign else 1.6)
        up = mlp.up_proj.weight[i].normal_(std=NOISE)
        up[at.shared] += 8 / (at.unit * (3 / 20) ** 0.5)  # strong: a step of Muon changes down_proj little
        result = f" ({(x - y if sign else x + y) % 10})"
        mlp.down_proj.weight[at.out, i] += RESULT * identity[problems.IDS[result]]
