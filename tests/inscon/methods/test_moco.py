"""The step against MoCo v2 written out independently, and the properties that a queue of keys stands on."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision

from inscon.methods import moco
from tests.inscon.methods.steps import BATCH, backward, logged, make_batch, make_method, small_inscon, take_steps

SETTINGS = moco.Settings(queue_size=3 * BATCH, key_momentum=0.9)


def independent(state, mlp=True):
    """torchvision's network with MoCo's head, of the weights of our query encoder."""
    net = torchvision.models.resnet18(weights=None).double().train()
    net.fc = (
        torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 128))
        if mlp
        else torch.nn.Linear(512, 128)
    ).double()
    net.load_state_dict({theirs(name): value.clone() for name, value in state.items()})
    return net


def theirs(name):
    return name.replace("backbone.network.", "").replace("head.", "fc.")


@pytest.mark.parametrize(("steps", "mlp", "temperature"), [(5, True, 0.2), (2, False, 0.07)])
def test_steps_are_mocos(steps, mlp, temperature):
    """v2 and v1, against a loop of its own: torchvision's ResNet, a [D K] queue, cross entropy, EMA, plain SGD, float64."""
    settings = moco.Settings(queue_size=3 * BATCH, key_momentum=0.9, mlp=mlp, temperature=temperature)
    ours = make_method(settings, norm="sync")
    net = independent(ours.query_encoder.state_dict(), mlp)
    follower = copy.deepcopy(net)
    queue, pointer = ours.queues["single"].keys.T.clone(), 0
    optimizer = torch.optim.SGD(ours.query_encoder.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    velocity = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    seen = []
    ours.query_encoder.register_forward_hook(lambda module, inputs, made: seen.append(made["single"].detach()))
    for step in range(steps):  # the queue holds three batches: steps 3 and 4 write over a wrap
        batch = make_batch(settings, seed=step)
        our_negatives = ours.queues["single"].keys.clone()
        prepared, losses = backward(ours, batch)
        optimizer.step()
        optimizer.zero_grad()
        ours.after_update()

        q = F.normalize(net(batch.views["query"].pixels.contiguous()), dim=1)
        with torch.no_grad():
            k = F.normalize(follower(batch.views["key"].pixels.contiguous()), dim=1)
        positive = torch.stack([(q[i] * k[i]).sum() for i in range(BATCH)])[:, None]
        logits = torch.cat([positive, q @ queue.clone()], 1) / temperature
        loss = F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long))
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        queue[:, pointer : pointer + BATCH] = k.T
        pointer = (pointer + BATCH) % queue.shape[1]
        with torch.no_grad():
            for (name, p), g in zip(net.named_parameters(), gradients):
                velocity[name] = 0.9 * velocity[name] + g + 1e-4 * p
                p -= 0.05 * velocity[name]
            for name, p in follower.named_parameters():
                p.copy_(0.9 * p + 0.1 * dict(net.named_parameters())[name])

        our_positive = (seen[-1] * prepared.own["single"]).sum(1, keepdim=True)
        our_logits = torch.cat([our_positive, seen[-1] @ our_negatives.T], 1) / temperature
        torch.testing.assert_close(our_logits, logits.detach(), rtol=1e-9, atol=1e-9)
        figures = logged(losses)
        torch.testing.assert_close(figures["loss"], loss.detach(), rtol=1e-10, atol=1e-10, check_dtype=True)
        assert torch.equal(figures["loss"], figures["loss_single"])
        assert figures["top1_single"].item() == pytest.approx((logits.argmax(1) == 0).double().mean().item())
        torch.testing.assert_close(ours.queues["single"].keys, queue.T, rtol=1e-9, atol=1e-9)
        assert ours.queues["single"].pointer == pointer
        for name, p in ours.key_encoder.named_parameters():
            torch.testing.assert_close(p, follower.get_parameter(theirs(name)), rtol=1e-8, atol=1e-10)
    assert len(seen) == steps


def test_inscons_single_head_alone_is_moco():
    """METHOD 16, bit for bit: losses, weights, queue."""
    alone = small_inscon(heads=("single",))
    ours, theirs = make_method(alone), make_method(moco.Settings(queue_size=3 * BATCH))
    batches = [make_batch(alone, seed=step) for step in range(3)]
    made, expected = take_steps(ours, batches), take_steps(theirs, batches)
    for one, other in zip(made, expected, strict=True):
        assert logged(one) == logged(other)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ours.queues["single"].keys, theirs.queues["single"].keys)


def test_keys_come_from_the_ema_weights_and_from_nothing_else():
    settings = moco.Settings(queue_size=3 * BATCH, key_momentum=0.5)
    method, batch = make_method(settings), make_batch(settings)
    before = method.prepare(batch).own
    with torch.no_grad():
        for p in method.query_encoder.parameters():
            p.add_(0.1 * torch.randn_like(p))
    assert torch.equal(before["single"], method.prepare(batch).own["single"])
    expected = {
        n: 0.5 * p + 0.5 * method.query_encoder.get_parameter(n) for n, p in method.key_encoder.named_parameters()
    }
    method.after_update()
    for name, p in method.key_encoder.named_parameters():
        torch.testing.assert_close(p, expected[name])
    assert not torch.allclose(before["single"], method.prepare(batch).own["single"])


def test_the_key_encoder_starts_as_the_query_encoder_and_is_no_part_of_it():
    method = make_method(SETTINGS)
    query, key = method.query_encoder.state_dict(), method.key_encoder.state_dict()
    assert query.keys() == key.keys() and all(torch.equal(query[name], key[name]) for name in query)
    storages = [
        {p.untyped_storage().data_ptr() for p in e.parameters()} for e in (method.query_encoder, method.key_encoder)
    ]
    assert not storages[0] & storages[1] and method.backbone is method.query_encoder.backbone


def test_no_gradient_reaches_the_key_side():
    method, batch = make_method(SETTINGS), make_batch(SETTINGS)
    prepared, _ = backward(method, batch)
    assert all(p.grad is None and not p.requires_grad for p in method.key_encoder.parameters())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in method.query_encoder.parameters())
    assert not prepared.own["single"].requires_grad and not method.queues["single"].keys.requires_grad


def changed_rows(a, b):
    return ((a - b).flatten(1).abs().amax(1) > 1e-9).nonzero().flatten().tolist()


def test_keys_are_normalized_in_other_company_than_their_queries():
    """Changing image j changes the queries of j's group and the keys of j's *other* group: nobody keeps all its company."""
    settings = moco.Settings(queue_size=48)
    method, plain = make_method(settings, batch=16), make_batch(settings, batch=16)
    for j in (0, 5, 15):
        changed = make_batch(settings, batch=16)
        for view in changed.views.values():
            view.pixels[j] += 3 * torch.randn_like(view.pixels[j])
        queries = [method.query_encoder(b.views["query"].pixels)["single"].detach() for b in (plain, changed)]
        keys = [method.prepare(b).own["single"] for b in (plain, changed)]
        query_company, key_company = changed_rows(*queries), changed_rows(*keys)
        group = j // 4 * 4
        assert query_company == list(range(group, group + 4))
        assert j in key_company and len(key_company) == 4
        # itself and at most one more; without shuffling all four
        assert len(set(query_company) & set(key_company)) <= 2
    method.eval()
    with torch.no_grad():
        assert changed_rows(*(method.encode_keys(b)["single"] for b in (plain, changed))) == [15]
