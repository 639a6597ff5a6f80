"""torchvision's network and plain heads with the weights of one of our encoders: what loops written from the papers stand on."""

import torch
import torch.nn.functional as F
import torchvision

FEW = 4
"""Images of a batch that loops go over."""


class Plain:
    """Reads the weights of a method's encoder by their names; float64, a gradient for each."""

    def __init__(self, encoder):
        state = {name: value.detach().clone() for name, value in encoder.state_dict().items()}
        self.net = torchvision.models.resnet18(weights=None).double().train()
        self.net.fc = torch.nn.Identity()
        prefix = "backbone.network."
        self.net.load_state_dict({n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)})
        self.weights = {n: v.requires_grad_() for n, v in state.items() if not n.startswith(prefix)}

    def maps(self, pixels):
        net, x, made = self.net, pixels.contiguous(), {}
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        for stride, layer in {4: net.layer1, 8: net.layer2, 16: net.layer3, 32: net.layer4}.items():
            made[stride] = x = layer(x)
        return made

    def linear(self, x, name):
        weight = self.weights[f"{name}.weight"]
        return F.linear(x, weight.flatten(1), self.weights[f"{name}.bias"])

    def mlp(self, x, name):
        """Rows [... F] through two layers, also where ours are 1x1 convolutions."""
        return self.linear(self.linear(x, f"{name}.0").clamp(min=0), f"{name}.2")

    def check_gradients(self, loss, encoder, digits=1e-6):
        """Those of `loss` are those that a step has left in `encoder`."""
        own = {f"backbone.network.{n}": p for n, p in self.net.named_parameters()} | self.weights
        found = dict(encoder.named_parameters())
        assert own.keys() == found.keys()
        for (name, _), gradient in zip(own.items(), torch.autograd.grad(loss, list(own.values())), strict=True):
            scale = gradient.abs().max().item()
            assert scale > 0, name
            torch.testing.assert_close(found[name].grad, gradient, rtol=digits, atol=digits * scale, msg=name)


def norm(x):
    return x / x.norm(dim=-1, keepdim=True)


def nce(query, key, negatives, temperature):
    """Of one query."""
    positive = (query @ key / temperature).exp()
    return -(positive / (positive + (negatives @ query / temperature).exp().sum())).log()
