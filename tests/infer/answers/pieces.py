"""Answers that several architectures share, written from their definitions; `H` heads, `H_kv` key and value heads."""

from __future__ import annotations

from lit_symopt.blocks import Action, Block, Layout, Role

RESIDUAL = "residual"


def vector(pattern: str, along: str | None = RESIDUAL, *, shift_invariant: bool = False) -> Block:
    """Gains, biases and scalars, with what their entries lie along (`None`: nothing a symmetry acts on)."""
    return Block(pattern, role=Role.VECTOR, along=along, shift_invariant=shift_invariant)


def layer_norm(pattern: str) -> list[Block]:
    """Gain and bias of a norm of the residual stream."""
    return [vector(f"{pattern}.weight"), vector(f"{pattern}.bias")]


def untied(embedding: str, head: str = "lm_head.weight") -> list[Block]:
    """An embedding, and a head without bias whose logits enter a plain softmax."""
    return [Block(embedding, role=Role.EMBEDDING), Block(head, role=Role.LM_HEAD, shift_invariant=True)]


def attention(
    q: str,
    k: str,
    v: str,
    o: str,
    *,
    heads: int,
    kv_heads: int,
    action: Action,
    biases: tuple[str, ...] = (),
) -> list[Block]:
    """Four projections, stored rows outputs. `biases` names those of q, k, v, o that have one."""
    blocks = [
        Block(f"{q}.weight", role=Role.QUERY, layout=Layout.heads(heads), action=action),
        Block(f"{k}.weight", role=Role.KEY, layout=Layout.heads(kv_heads), action=action),
        Block(f"{v}.weight", role=Role.VALUE, layout=Layout.heads(kv_heads)),
        Block(f"{o}.weight", role=Role.ATTENTION_OUT, layout=Layout.heads(heads, dim="columns")),
    ]
    along = {"q": (q, "query"), "k": (k, "key"), "v": (v, "value"), "o": (o, RESIDUAL)}
    return blocks + [vector(f"{along[name][0]}.bias", along[name][1]) for name in biases]


def gated_mlp(gate: str, up: str, down: str, *, biases: bool = False) -> list[Block]:
    """`down(act(gate(x)) * up(x))`."""
    blocks = [
        Block(f"{gate}.weight", role=Role.GATE, action=Action.PERMUTATION),
        Block(f"{up}.weight", role=Role.UP, action=Action.MONOMIAL),
        Block(f"{down}.weight", role=Role.DOWN, layout=Layout.transposed(), action=Action.MONOMIAL),
    ]
    named = [vector(f"{gate}.bias", "gate"), vector(f"{up}.bias", "up"), vector(f"{down}.bias")]
    return blocks + (named if biases else [])


def plain_mlp(first: str, second: str, *, biases: bool) -> list[Block]:
    """`second(act(first(x)))`: the activation leaves only permutations."""
    blocks = [
        Block(f"{first}.weight", role=Role.UP, action=Action.PERMUTATION),
        Block(f"{second}.weight", role=Role.DOWN, layout=Layout.transposed(), action=Action.PERMUTATION),
    ]
    return blocks + ([vector(f"{first}.bias", "up"), vector(f"{second}.bias")] if biases else [])


def expert_stacks(prefix: str) -> list[Block]:
    """`gate_up_proj [E, 2I, d]`, gate rows before up rows, and `down_proj [E, d, I]`; SwiGLU."""
    return [
        Block(
            f"{prefix}.gate_up_proj",
            role=Role.EXPERT_GATE_UP,
            layout=Layout.experts(Layout.gate_up("stacked")),
            action=Action.MONOMIAL,
        ),
        Block(
            f"{prefix}.down_proj",
            role=Role.EXPERT_DOWN,
            layout=Layout.experts(Layout.transposed()),
            action=Action.MONOMIAL,
        ),
    ]


def router(weight: str, *, softmax: bool) -> Block:
    """Only a softmax cannot see a shift common to all experts."""
    return Block(weight, role=Role.ROUTER, shift_invariant=softmax)


def llama_attention(heads: int, kv_heads: int, *, biases: tuple[str, ...] = ()) -> list[Block]:
    """Rotary halves over the whole head, under the names of Llama and its descendants."""
    names = ("*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj")
    return attention(*names, heads=heads, kv_heads=kv_heads, action=Action.ROTARY_HALVES, biases=biases)


def rms_norms() -> list[Block]:
    """The two norms of a Llama layer and the last one."""
    return [
        vector("*.input_layernorm.weight"),
        vector("*.post_attention_layernorm.weight"),
        vector("model.norm.weight"),
    ]
