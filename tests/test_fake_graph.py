"""The fake CUDA graph notices what a real one would get wrong."""

import pytest
import torch
import torch.nn.functional as F

from tests.fake_graph import FakeGraph

DEVICE = torch.device("cpu")


def captured(work):
    graph = FakeGraph(DEVICE)
    return graph, graph.capture(work)


def test_a_capture_changes_nothing_and_a_replay_computes_with_what_is_there_then():
    x, total = torch.ones(3), torch.zeros(3)
    graph, out = captured(lambda: total.add_(x) * 2)
    assert total.tolist() == [0.0] * 3 and out.isnan().all()
    x.fill_(5.0)
    graph.replay()
    graph.replay()
    assert total.tolist() == [10.0] * 3 and out.tolist() == [20.0] * 3


def test_a_number_of_the_host_stays_that_of_the_capture():
    rate, x = 2.0, torch.ones(3)
    graph, out = captured(lambda: x * rate)
    rate = 7.0
    graph.replay()
    assert out.tolist() == [2.0] * 3


def test_rows_are_taken_by_numbers_on_the_device():
    x, rows = torch.arange(12.0).view(4, 3), torch.tensor([1, 3])
    graph, out = captured(lambda: x[rows])
    rows.copy_(torch.tensor([2, 0]))
    graph.replay()
    assert torch.equal(out, x[[2, 0]])


@pytest.mark.parametrize("autocast", [False, True])
def test_training_steps_have_the_bits_of_launched_ones(autocast):
    def run(graph):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        x, y = torch.empty(5, 8), torch.empty(5, dtype=torch.int64)

        def step():
            for half in (slice(0, 2), slice(2, 5)):  # the second one adds to the gradients
                with torch.autocast("cpu", torch.bfloat16, autocast):
                    loss = F.cross_entropy(model(x[half]), y[half])
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        out, losses = None, []
        for number in range(9):
            x.copy_(torch.randn(5, 8))
            y.copy_(torch.randint(4, (5,)))
            if graph is None or number < 2:
                losses.append(float(step()))
                continue
            out = graph.capture(step) if out is None else out
            graph.replay()
            losses.append(float(out))
        return losses, [parameter.detach() for parameter in model.parameters()]

    (losses, weights), (others, other_weights) = run(None), run(FakeGraph(DEVICE))
    assert losses == others
    assert all(map(torch.equal, weights, other_weights))


@pytest.mark.parametrize(
    "work",
    [
        lambda x: float(x.sum()),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
        lambda x: F.dropout(x, 0.5),
        lambda x: x.normal_(),
    ],
)
def test_what_a_capture_cannot_hold_fails(work):
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="during a capture"):
        captured(lambda: work(x.mul_(2)))
    assert x.tolist() == [1.0] * 3


def test_memory_that_was_freed_is_noticed():
    kept = {"x": torch.ones(3)}
    graph, out = captured(lambda: kept["x"] + 1)
    graph.replay()
    assert out.tolist() == [2.0] * 3
    kept["x"] = torch.ones(3)
    with pytest.raises(RuntimeError, match="was freed"):
        graph.replay()


def test_a_tensor_that_takes_the_place_of_another_is_not_what_a_replay_reads():
    state = {"veto": torch.zeros(())}

    def work():
        state["veto"] = torch.maximum(state["veto"], torch.ones(()))
        return state["veto"]

    before = state["veto"]
    graph, out = captured(work)
    graph.replay()
    assert float(before) == 0.0 and float(out) == 1.0
