"""A pass is recorded as it ran. Oracle: what the module computes, known by its definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lit_symopt.trace import WRITE, Node, Ref, Trace, record


class Calls(nn.Module):
    """A module whose forward is a function of a 3 x 4 weight and the input."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(12.0).view(3, 4))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.weight, x)


def traced(function: Callable[[Tensor, Tensor], Tensor], x: Tensor | None = None) -> Trace:
    module, x = Calls(function), torch.ones(2, 4) if x is None else x
    return record(lambda: module(x), module, x)


def read(node: Node) -> list[int]:
    return [ref.index for ref in node.refs()]


def test_operations_are_recorded_in_order_with_what_they_read() -> None:
    trace = traced(lambda w, x: torch.relu(x @ w.t()))
    assert [node.op for node in trace.nodes] == ["t", "mm", "relu"]
    transposed, product, activated = trace.nodes
    assert trace.values[read(transposed)[0]].name == "weight"
    assert trace.values[read(product)[0]].origin == "batch"
    assert read(product)[1] == transposed.outputs[0]
    assert read(activated) == list(product.outputs)
    assert trace.outputs == {"": activated.outputs[0]}


def test_a_tied_parameter_has_its_first_name_wherever_it_is_used() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.head(self.embed(ids))
            return out

    module, ids = Tied(), torch.tensor([[1, 2]])
    trace = record(lambda: module(ids), module, {"ids": ids})
    used = {trace.values[index].name for node in trace.nodes for index in read(node)}
    assert "embed.weight" in used
    assert "head.weight" not in used
    assert any(value.origin == "batch" and value.name == "ids" for value in trace.values)


def test_a_write_through_a_view_is_seen_by_whoever_reads_the_whole_afterwards() -> None:
    def writes(weight: Tensor, x: Tensor) -> Tensor:
        whole = torch.zeros(2, 6)
        whole[:, :3].copy_(x @ weight.t())
        return whole + 1

    trace = traced(writes)
    (seam,) = [node for node in trace.nodes if node.op == WRITE]
    copied = next(node for node in trace.nodes if node.op == "copy")
    last = trace.nodes[-1]
    assert copied.outputs[0] in read(seam)
    assert read(last) == list(seam.outputs)


def test_a_write_in_place_makes_a_new_version() -> None:
    def writes(weight: Tensor, x: Tensor) -> Tensor:
        y = x @ weight.t()
        before = y * 2
        y.add_(1)
        return before + y

    trace = traced(writes)
    product = next(node for node in trace.nodes if node.op == "mm")
    doubled, added, total = trace.nodes[-3:]
    assert (doubled.op, added.op) == ("mul", "add")
    assert read(doubled) == list(product.outputs)
    assert read(total) == [doubled.outputs[0], added.outputs[0]]
    assert added.outputs != product.outputs


def test_freed_memory_that_is_used_again_is_another_tensor() -> None:
    def chain(_: Tensor, x: Tensor) -> Tensor:
        for _step in range(200):
            x = x * 1.5
        return x

    trace = traced(chain, torch.ones(50, 50))
    assert len(trace.nodes) == 200
    for before, after in zip(trace.nodes, trace.nodes[1:], strict=False):
        assert read(after) == list(before.outputs)


def test_activations_are_not_kept_alive() -> None:
    seen: list[StorageWeakRef] = []

    def forgets(weight: Tensor, x: Tensor) -> Tensor:
        hidden = x @ weight.t()
        seen.append(StorageWeakRef(hidden.untyped_storage()))
        total = hidden.sum(-1)
        del hidden
        assert seen[0].expired()  # while the pass still runs
        return total

    trace = traced(forgets)
    assert [node.op for node in trace.nodes][-1] == "sum"


def test_integers_that_index_are_kept_with_their_entries_and_activations_are_not() -> None:
    trace = traced(lambda w, x: x[:, torch.tensor([2, 0])] @ w[:, :2].t())
    kept = [value for value in trace.values if value.data is not None]
    assert [value.data.tolist() for value in kept if value.data is not None] == [[2, 0]]
    assert not any(value.dtype.is_floating_point for value in kept)


def test_what_a_pass_returns_is_found_by_its_path() -> None:
    module = Calls(lambda w, x: x)
    x = torch.ones(2, 4)
    trace = record(lambda: {"logits": module(x) * 2, "states": [x, None]}, module, x)
    assert set(trace.outputs) == {"logits", "states.0"}
    assert trace.values[trace.outputs["states.0"]].origin == "batch"


@pytest.mark.parametrize("enabled", [True, False])
def test_the_encoder_fast_path_is_off_during_the_pass_and_as_before_after_it(enabled: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x, before = torch.randn(2, 3, 8), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        ops = {node.op for node in record(lambda: layer(x), layer, x).nodes}
        assert torch.backends.mha.get_fastpath_enabled() == enabled
        with pytest.raises(RuntimeError, match="stops"):
            record(lambda: (_ for _ in ()).throw(RuntimeError("stops")), layer, x)
        assert torch.backends.mha.get_fastpath_enabled() == enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    assert "_transformer_encoder_layer_fwd" not in ops
    assert "addmm" in ops


def test_no_gradient_graph_is_made() -> None:
    module, x = Calls(lambda w, x: x @ w.t()), torch.ones(2, 4)
    kept: list[Tensor] = []
    record(lambda: kept.append(module(x)), module, x)
    assert kept[0].grad_fn is None
    assert torch.is_grad_enabled()


def test_a_reference_is_an_index() -> None:
    trace = traced(lambda w, x: torch.cat([x, x]))
    assert trace.nodes[0].args[0] == [Ref(read(trace.nodes[0])[0])] * 2
