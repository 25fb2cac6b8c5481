"""READ's side network by itself: it computes what torch's own recurrent layers compute, and exact gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery.side.memory import Memory
from surgery.side.network import SideNetwork
from surgery.side.recurrence import Joiner, SideStack
from surgery.side.settings import GATES, SideSettings, Stack
from surgery.side.steps import EPSILON, GruStep, LstmStep, ReadLayer, RnnStep, _product_dtype, exact
from tests.reading import keeping

WIDTH, HIDDEN, LAYERS, TOKENS = 6, 3, 4, 5
SMALL = SideSettings(hidden=HIDDEN)
CELLS = tuple(GATES)
TORCH_CELLS: dict[str, Any] = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in double precision."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def stack_of(settings: SideSettings, *, joiner: str = "none", is_source: bool = False) -> SideStack:
    """The side network of one stack, in double precision, each parameter drawn."""
    stack = SideStack(settings, WIDTH, joiner=joiner, is_source=is_source).double()
    with torch.no_grad():
        for number, parameter in enumerate(stack.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=number) * 0.6)
    return stack


def outputs_of_layers(tokens: int = TOKENS) -> list[Tensor]:
    """The embedding output and each layer's, of different sizes: a norm that is left out shows."""
    return [drawn(tokens, WIDTH, seed=100 + layer) * (layer + 0.5) for layer in range(LAYERS + 1)]


def corrected(stack: SideStack, states: Sequence[Tensor], memory: Memory | None = None) -> Tensor:
    """What the side network makes of them, as the hooks call it."""
    start = stack.start(states[0])
    return stack.correction(stack([stack.read(x, stack.readers(), memory) for x in states[1:]], start))


read_layer: Any = ReadLayer.apply


def gradients(result: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradients of a number that weighs each element of the result otherwise."""
    weights = torch.arange(result.numel(), dtype=result.dtype).reshape(result.shape).cos()
    wanted = list(parameters.values())
    found: Any = torch.autograd.grad((result * weights).sum(), wanted, allow_unused=True, retain_graph=True)
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


def require_equal(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same names, and values up to the rounding of double precision."""
    assert mine.keys() == theirs.keys()
    for name, values in mine.items():
        assert torch.allclose(values, theirs[name], rtol=1e-9, atol=1e-12), name


def rms_normed(x: Tensor, scale: Tensor) -> Tensor:
    """The norm of READ, written out."""
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * scale


# --- the recurrence is torch's


def step_by_hand(cell: str, given: Tensor, h: Tensor, c: Tensor, weights: Any) -> tuple[Tensor, Tensor]:
    """One step as the papers of the cells write it, in the order of gates that torch has. given: W_ih x + b_ih."""
    kept = h @ weights.weight_hh.T + weights.bias_hh
    if cell == "rnn":
        return (given + kept).tanh(), c
    if cell == "lstm":
        i, f, new, o = (given + kept).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * new.tanh()
        return o.sigmoid() * c.tanh(), c
    (gr, gz, gn), (kr, kz, kn) = given.chunk(3, dim=-1), kept.chunk(3, dim=-1)
    z = (gz + kz).sigmoid()
    return (1 - z) * (gn + (gr + kr).sigmoid() * kn).tanh() + z * h, c


def by_hand(stack: SideStack, states: Sequence[Tensor], memory: Memory | None = None) -> Tensor:
    """The whole side network as a loop over plain tensors, differentiated by torch."""
    s = stack.settings
    sequence = [rms_normed(x, stack.norm) for x in states]
    start = torch.zeros(len(states[0]), s.hidden, dtype=torch.float64)
    if stack.initial is not None:
        start = sequence[0] @ stack.initial.weight.T + stack.initial.bias
    steps = sequence[1:]
    cells: list[Any] = list(stack.directions)
    joined = [join_by_hand(stack.joiner, x, stack.norm, memory) if memory else 0.0 for x in states[1:]]
    for layer in range(s.recurrent_layers):
        runs = []
        for backwards in (False, True)[: 1 + s.bidirectional]:
            h, c, weights, run = start, torch.zeros_like(start), cells.pop(0), []
            gates = [x @ weights.weight_ih.T + weights.bias_ih for x in steps]
            gates = gates if layer else [g + j for g, j in zip(gates, joined, strict=True)]
            for given in reversed(gates) if backwards else gates:
                h, c = step_by_hand(s.cell, given, h, c, weights)
                run.append(h)
            runs.append(run)
        ends = [run[-1] for run in runs]
        steps = [torch.cat(pair, -1) for pair in zip(runs[0], *(run[::-1] for run in runs[1:]), strict=True)]
    reduced = torch.cat(ends, -1) if s.reduce == "last" else sum(steps, torch.zeros(())) / len(steps)
    result = reduced @ stack.output.weight.T + stack.output.bias  # type: ignore[union-attr]
    return (rms_normed(result, stack.output_norm) if s.output_norm else result) * s.scale  # type: ignore[arg-type]


def by_torch(stack: SideStack, states: Sequence[Tensor]) -> Tensor:
    """The same with torch.nn.GRU, LSTM or RNN over the normed states, fed with our parameters."""
    s, directions = stack.settings, 1 + stack.settings.bidirectional
    theirs = TORCH_CELLS[s.cell](WIDTH, s.hidden, s.recurrent_layers, bidirectional=s.bidirectional).double()
    sequence = torch.stack([rms_normed(x, stack.norm) for x in states])
    start = torch.zeros(len(stack.directions), len(states[0]), s.hidden, dtype=torch.float64)
    if stack.initial is not None:
        start = start + (sequence[0] @ stack.initial.weight.T + stack.initial.bias)
    mine: dict[str, Tensor] = {}
    for number, direction in enumerate(stack.directions):
        ending = f"l{number // directions}" + ("_reverse" if number % directions else "")
        mine |= {f"{name}_{ending}": parameter for name, parameter in direction.named_parameters()}
    given = (start, torch.zeros_like(start)) if s.cell == "lstm" else start
    steps, last = torch.func.functional_call(theirs, mine, (sequence[1:], given))
    last = last[0] if s.cell == "lstm" else last
    reduced = torch.cat(list(last[-directions:]), -1) if s.reduce == "last" else steps.mean(0)
    result = stack.output(reduced)  # type: ignore[misc]
    return (rms_normed(result, stack.output_norm) if s.output_norm else result) * s.scale  # type: ignore[arg-type]


@pytest.mark.parametrize("reference", (by_hand, by_torch))
@pytest.mark.parametrize("reduce", ("last", "mean"))
@pytest.mark.parametrize("initial", ("zero", "embedding"))
@pytest.mark.parametrize("bidirectional", (False, True), ids=("forward", "both ways"))
@pytest.mark.parametrize("recurrent_layers", (1, 2))
@pytest.mark.parametrize("cell", CELLS)
def test_the_recurrence_is_torch_s(
    cell: str,
    recurrent_layers: int,
    bidirectional: bool,
    initial: str,
    reduce: str,
    reference: Callable[[SideStack, Sequence[Tensor]], Tensor],
) -> None:
    """In double precision the correction and every parameter's gradient are a plain loop's and torch's own layer's."""
    settings = SideSettings(
        cell=cell, hidden=HIDDEN, recurrent_layers=recurrent_layers, bidirectional=bidirectional, initial=initial,
        reduce=reduce,
    )  # fmt: skip
    stack, states = stack_of(settings), outputs_of_layers()
    mine, theirs = corrected(stack, states), reference(stack, states)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    parameters = dict(stack.named_parameters())
    found = gradients(mine, parameters)
    assert found.keys() == parameters.keys()
    require_equal(found, gradients(theirs, parameters))


@pytest.mark.parametrize("cell", CELLS)
def test_the_correction_s_norm_and_scale(cell: str) -> None:
    """`output_norm` and `scale` come after the projection back, and learn."""
    stack = stack_of(replace(SMALL, cell=cell, output_norm=True, scale=0.3))
    states, parameters = outputs_of_layers(), dict(stack.named_parameters())
    mine, theirs = corrected(stack, states), by_hand(stack, states)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    require_equal(gradients(mine, parameters), gradients(theirs, parameters))
    assert "output_norm" in parameters


def test_one_layer_is_enough() -> None:
    """A recurrence of a single step, for every cell and both ways."""
    for cell, bidirectional in itertools.product(CELLS, (False, True)):
        stack, states = stack_of(replace(SMALL, cell=cell, bidirectional=bidirectional)), outputs_of_layers()[:2]
        torch.testing.assert_close(corrected(stack, states), by_hand(stack, states), rtol=1e-10, atol=1e-12)


# --- each step's own gradient, by numerical differentiation


def leaf(*shape: int, seed: int) -> Tensor:
    """Numbers that want a gradient."""
    return drawn(*shape, seed=seed).requires_grad_()


@pytest.mark.parametrize("cell", CELLS)
def test_a_step_s_gradient_is_exact(cell: str) -> None:
    """gradcheck over gates, states, weights and biases, though the gates are overwritten."""
    gates = GATES[cell] * HIDDEN
    states = [leaf(TOKENS, HIDDEN, seed=10 + n) for n in range(2 if cell == "lstm" else 1)]
    rest = (leaf(gates, HIDDEN, seed=20), leaf(gates, seed=21), leaf(gates, seed=22))
    step: Any = {"gru": GruStep, "lstm": LstmStep, "rnn": RnnStep}[cell]
    assert torch.autograd.gradcheck(lambda g, *others: step.apply(g.clone(), *others),
                                    (leaf(TOKENS, gates, seed=0), *states, *rest))  # fmt: skip


def test_a_layer_s_output_gets_no_gradient() -> None:
    """ReadLayer differentiates by the weight, exactly, and gives the backbone nothing."""
    x, weight = leaf(TOKENS, WIDTH, seed=0), leaf(4, WIDTH, seed=1)
    assert torch.autograd.gradcheck(lambda w: read_layer(x.detach(), w), (weight,))
    read_layer(x, weight).sum().backward()
    assert x.grad is None
    assert weight.grad is not None


def test_a_state_of_zeros_or_of_huge_numbers_is_read() -> None:
    """The norm has an epsilon, and squares are summed in fp32: neither gives a NaN or an infinity, in fp16 either."""
    weight = torch.ones(4, WIDTH)
    assert torch.equal(read_layer(torch.zeros(2, WIDTH), weight), torch.zeros(2, 4))
    huge = torch.full((2, WIDTH), 6e4, dtype=torch.float16)
    torch.testing.assert_close(read_layer(huge, weight), torch.full((2, 4), float(WIDTH)))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
def test_states_of_low_precision_are_read_in_fp32(dtype: torch.dtype) -> None:
    """What is read is the rounded state, not a rounded product: the gates are those of the same numbers in fp32."""
    x, weight = drawn(TOKENS, WIDTH).to(dtype), drawn(4, WIDTH, seed=1).float().requires_grad_()
    mine, theirs = read_layer(x, weight), rms_normed(x.double(), torch.ones(())) @ weight.double().T
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6)
    pair = [torch.autograd.grad(y.double().square().sum(), weight)[0] for y in (mine, theirs)]
    assert pair[0].dtype == torch.float32
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


def test_fp16_states_are_multiplied_in_fp32() -> None:
    """On every device; bf16 states, whose range is that of fp32, are multiplied as they are where that is fast."""
    found = {
        (device, dtype): _product_dtype(torch.empty(1, dtype=dtype, device=device), torch.empty(1))
        for device in ("cpu", "meta")
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
    }
    assert found.pop(("meta", torch.bfloat16)) == torch.bfloat16
    assert set(found.values()) == {torch.float32}


@pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=pytest.mark.gpu)))
@pytest.mark.parametrize(("size", "slope"), ((1.0, 1e-5), (30.0, 1e-5), (1000.0, 1e-6), (20000.0, 1e-3)))
def test_fp16_states_neither_overflow_nor_lose_their_gradient(size: float, slope: float, device: str) -> None:
    """States near fp16's largest number, gradients far below its smallest: both are those of double precision."""
    tokens, width, gates = 256, 128, 24
    x = (drawn(tokens, width) * size).clamp(-6e4, 6e4).half().to(device)
    weight = (drawn(gates, width, seed=1) / 8).float().to(device).requires_grad_()
    dy = (drawn(tokens, gates, seed=2) * slope).float().to(device)
    mine = read_layer(x, weight)
    mine.backward(dy)
    normed = rms_normed(x.double(), torch.ones((), device=device))
    torch.testing.assert_close(mine.double(), normed @ weight.double().T, rtol=1e-4, atol=1e-4)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad.double() / slope, dy.double().T @ normed / slope, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("joiner", ("none", "attention", "mean"))
def test_autocast_changes_nothing_in_the_recurrence(cell: str, joiner: str) -> None:
    """Inside the hooks' own guard the side network gives bit for bit what it gives without autocast."""
    stack = stack_of(replace(SMALL, cell=cell, recurrent_layers=2, initial="embedding"), joiner=joiner).float()
    states = [x.float() for x in outputs_of_layers()]
    memory = Memory(states[0], drawn(1, 4, HIDDEN).float(), None)

    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), exact(states[0]):
            results.append(corrected(stack, states, memory))
    assert torch.equal(*results)
    plain, mixed = (gradients(result, dict(stack.named_parameters())) for result in results)
    assert all(torch.equal(plain[name], mixed[name]) for name in plain)


KEPT = {"gru": 5, "lstm": 7, "rnn": 1}  # times hidden, of each step and token


@pytest.mark.parametrize("cell", CELLS)
def test_backward_keeps_each_layer_s_output_and_the_gates(cell: str) -> None:
    """A layer more costs its output, one number a token for the norm, and what the step's docstring says: no copy."""
    stack, states = stack_of(replace(SMALL, cell=cell)), outputs_of_layers()

    def kept(layers: int) -> int:
        with keeping() as found:
            result = corrected(stack, states[: 1 + layers])
        assert result.requires_grad
        return found.bytes_besides(stack)

    assert kept(LAYERS) - kept(LAYERS - 1) == 8 * TOKENS * (WIDTH + 1 + KEPT[cell] * HIDDEN)


# --- from encoder to decoder


BATCH, SOURCE = 2, 4
MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])


def joined(kind: str, mask: Tensor | None, *, settings: SideSettings = SMALL) -> tuple[SideStack, list[Tensor], Memory]:
    """A decoder's side network, what its layers gave, and an encoder's side states that want a gradient."""
    stack = stack_of(settings, joiner=kind)
    memory = Memory(torch.empty(0), leaf(BATCH, SOURCE, HIDDEN * (1 + settings.bidirectional), seed=50), mask)
    return stack, outputs_of_layers(BATCH * TOKENS), memory


def join_by_hand(joiner: Any, x_nd: Tensor, norm_d: Tensor, memory: Memory) -> Tensor:
    """Softmax attention with one head, or the mean of the tokens that are no padding, one sequence after the other."""
    parts = []
    for number, x in enumerate(x_nd.reshape(BATCH, -1, WIDTH)):
        states = memory.states_bsh[number]
        if memory.mask_bs is not None:
            states = states[memory.mask_bs[number] == 1]
        if joiner.kind == "mean":
            parts.append((states.mean(0) @ joiner.mix.T).expand(len(x), -1))
            continue
        scores = rms_normed(x, norm_d) @ joiner.query.T @ (states @ joiner.key.T).T / joiner.query.shape[0] ** 0.5
        parts.append(scores.softmax(-1) @ states @ joiner.mix.T)
    return torch.cat(parts)


@pytest.mark.parametrize("mask", (None, MASK), ids=("whole", "padded"))
@pytest.mark.parametrize("kind", ("attention", "mean"))
def test_the_joiner_is_attention_by_hand(kind: str, mask: Tensor | None) -> None:
    """Its gates, and the gradients of its parameters, of the norm and of the encoder's states."""
    stack, (x, *_), memory = joined(kind, mask)
    joiner: Any = stack.joiner
    wanted: Any = {**dict(joiner.named_parameters()), "norm": stack.norm, "states": memory.states_bsh}
    query = stack.readers()[1] if kind == "attention" else None
    mine, theirs = joiner(x, query, memory), join_by_hand(joiner, x, stack.norm, memory)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    require_equal(gradients(mine, wanted), gradients(theirs, wanted))
    assert len(gradients(mine, wanted)) == (5 if kind == "attention" else 2)


@pytest.mark.parametrize("bidirectional", (False, True), ids=("forward", "both ways"))
@pytest.mark.parametrize("kind", ("attention", "mean"))
@pytest.mark.parametrize("cell", CELLS)
def test_what_is_joined_is_added_to_every_step_s_gates(cell: str, kind: str, bidirectional: bool) -> None:
    """In both directions of the first recurrent layer, and not in the second: the whole is a loop by hand."""
    settings = replace(SMALL, cell=cell, bidirectional=bidirectional, recurrent_layers=2, initial="embedding")
    stack, states, memory = joined(kind, MASK, settings=settings)
    wanted: Any = {**dict(stack.named_parameters()), "states": memory.states_bsh}
    mine, theirs = corrected(stack, states, memory), by_hand(stack, states, memory)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    require_equal(gradients(mine, wanted), gradients(theirs, wanted))


@pytest.mark.parametrize("bidirectional", (False, True), ids=("forward", "both ways"))
@pytest.mark.parametrize("mask", (None, MASK), ids=("whole", "padded"))
@pytest.mark.parametrize("kind", ("attention", "mean"))
def test_the_joiner_s_gradients_pass_gradcheck(kind: str, mask: Tensor | None, bidirectional: bool) -> None:
    """Through the whole recurrence, by the joiner's parameters, the norm's scale and the encoder's states."""
    stack, states, memory = joined(kind, mask, settings=replace(SMALL, bidirectional=bidirectional))
    assert isinstance(stack.joiner, Joiner)
    inputs = (*stack.joiner.parameters(), stack.norm, memory.states_bsh)
    assert torch.autograd.gradcheck(lambda *_: corrected(stack, states[:3], memory), inputs)


@pytest.mark.parametrize("kind", ("attention", "mean"))
def test_padding_of_the_encoder_has_no_influence(kind: str) -> None:
    """Whatever stands at padded places, the correction is the same, and no gradient goes there."""
    results = []
    for factor in (1.0, -50.0):
        stack, states, memory = joined(kind, MASK)
        with torch.no_grad():
            memory.states_bsh[MASK == 0] *= factor
        result = corrected(stack, states, memory)
        (gradient,) = torch.autograd.grad(result.square().sum(), memory.states_bsh)
        assert not gradient[MASK == 0].any()
        assert bool(gradient[MASK == 1].any())
        results.append(result.detach())
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


def test_each_sequence_asks_its_own_encoder() -> None:
    """With a joiner, another source for the second sequence leaves the first as it was."""
    stack, states, memory = joined("attention", None)
    before = corrected(stack, states, memory)
    with torch.no_grad():
        memory.states_bsh[1] += 1.0
    after = corrected(stack, states, memory)
    assert torch.equal(before[:TOKENS], after[:TOKENS])
    assert not torch.allclose(before[TOKENS:], after[TOKENS:])


# --- sizes and names


@pytest.mark.parametrize("depth", (2, 6))
def test_a_gru_has_as_many_values_as_the_paper_s(depth: int) -> None:
    """3h(d + h) + 6h of the recurrence, hd + d of the projection back, d of the norm, at any depth."""
    h, d = 5, 32
    described = Stack("backbone", "model.layers", "model.norm", depth, d, tuple(range(depth)))
    with torch.device("meta"):
        network = SideNetwork(SideSettings(hidden=h), [described])
    assert sum(p.numel() for p in network.parameters()) == 3 * h * (d + h) + 6 * h + h * d + 2 * d


@pytest.mark.parametrize(
    ("layers", "leave", "around"),
    (
        ("model.layers", "model.norm", ["", "model"]),
        ("bert.encoder.layer", "bert.encoder.layer.1", ["", "bert", "bert.encoder"]),
        ("layers", "norm", [""]),
        ("a.layers", "b.norm", [""]),
    ),
)
def test_the_modules_around_a_stack(layers: str, leave: str, around: list[str]) -> None:
    """From the model itself inwards, those that hold both the layers and the exit."""
    assert Stack("backbone", layers, leave, 2, 4, ()).around == around
