"""Backbones against the libraries' own networks: strides and channels of their maps, and names that load."""

import sys

import pytest
import timm
import torch
import torchvision

from inscon.nn.backbones import build_backbone, check_side, facts_of

BIG = ("resnet50", "resnext50_32x4d", "wide_resnet50_2")
SMALL = {
    "resnet18": ({4: 64, 8: 128, 16: 256, 32: 512}, True),
    "resnet10t": ({4: 64, 8: 128, 16: 256, 32: 512}, True),
    "convnext_atto": ({4: 40, 8: 80, 16: 160, 32: 320}, False),
    "vit_tiny_patch16_224": ({16: 192}, False),
}
"""Name -> (channels by stride, whether there is BatchNorm)."""


def library_says(name):
    if name.startswith(("resnet18", "resnet50", "resnext", "wide")):
        network = torchvision.models.get_model(name, weights=None)
        network.fc = torch.nn.Identity()
        return network
    return timm.create_model(name, num_classes=0)


@pytest.mark.parametrize("name", SMALL)
def test_maps_have_the_strides_and_channels_that_are_said(name):
    """Of a view and of a mosaic twice its size; and what is known before the network is built is what it turns out to be."""
    backbone, (channels, has_batch_norm) = build_backbone(name).train(), SMALL[name]
    facts = facts_of(name)
    assert backbone.channels == facts.channels == channels and facts.has_batch_norm is has_batch_norm
    assert backbone.last == max(channels)
    for side in (64, 128):
        maps = backbone(torch.randn(2, 3, side, side))
        shapes = {stride: tuple(own.shape) for stride, own in maps.items()}
        assert shapes == {stride: (2, count, side // stride, side // stride) for stride, count in channels.items()}
        last = maps[backbone.last]
        torch.testing.assert_close(backbone.pooled(maps), last.mean((2, 3)), rtol=1e-4, atol=1e-5)
        check_side(name, side)


@pytest.mark.parametrize("name", BIG)
def test_the_big_onesfacts_of(name):
    facts = facts_of(name)
    assert facts.channels == {4: 256, 8: 512, 16: 1024, 32: 2048} and facts.has_batch_norm
    with torch.device("meta"):
        backbone, theirs = build_backbone(name), library_says(name)
        maps = backbone(torch.empty(2, 3, 224, 224))
    assert {s: tuple(own.shape[1:]) for s, own in maps.items()} == {
        s: (count, 224 // s, 224 // s) for s, count in facts.channels.items()
    }
    assert {k: v.shape for k, v in backbone.network.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }


@pytest.mark.parametrize("name", SMALL)
def test_a_state_dict_loads_into_the_librarys_own_network(name):
    """Strictly, below `network`; and the library's network then makes of a picture what ours does."""
    backbone = build_backbone(name).eval()
    for parameter in backbone.parameters():  # so that a tensor that is left out shows
        parameter.data += 0.01 * torch.randn_like(parameter)
    theirs = library_says(name)
    prefix = "network."
    state = {key.removeprefix(prefix): value for key, value in backbone.state_dict().items()}
    assert all(key.startswith(prefix) for key in backbone.state_dict())
    theirs.load_state_dict(state, strict=True)
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        last = backbone(pixels)[backbone.last]
        if hasattr(theirs, "forward_features"):
            expected = theirs.eval().forward_features(pixels)
            if expected.ndim == 3:  # a ViT's tokens, behind that of the class
                expected = expected[:, 1:].transpose(1, 2).unflatten(2, last.shape[2:])
            torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(last.mean((2, 3)), theirs.eval()(pixels), rtol=1e-4, atol=1e-5)


def test_resnet50_is_torchvisions():
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(weights=None).eval()
    ours = build_backbone("resnet50").eval()
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    assert len(state) == 318
    ours.network.load_state_dict(state, strict=True)
    x = torch.randn(1, 3, 64, 64)
    maps = ours(x)
    torch.testing.assert_close(theirs.fc(ours.pooled(maps)), theirs(x))


def test_the_same_seed_gives_the_librarys_weights():
    """Looking at facts, or trying sizes, draws nothing from PyTorch's generator."""
    torch.manual_seed(3)
    theirs = timm.create_model("resnet10t", num_classes=0).state_dict()
    torch.manual_seed(3)
    facts_of.cache_clear()
    facts_of("resnet10t"), check_side("convnext_atto", 96)
    ours = build_backbone("resnet10t", norm_groups=2).network.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_gradients_of_the_pooled_map_go_back_channels_last():
    backbone = build_backbone("resnet18").to(memory_format=torch.channels_last).train()
    seen = []
    maps = backbone(torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last))
    maps[32].register_hook(lambda gradient: seen.append(gradient.is_contiguous(memory_format=torch.channels_last)))
    backbone.pooled(maps).square().sum().backward()
    assert seen == [True]


@pytest.mark.parametrize("name", ["resnet18", "resnet10t"])
def test_batchnorm_is_split_within_a_backbone(name):
    """Changing one image changes those of its group alone."""
    torch.manual_seed(0)
    backbone, pixels = build_backbone(name, norm_groups=2).train(), torch.randn(8, 3, 32, 32)
    changed = pixels.clone()
    changed[5] += 1
    maps = [backbone(x)[8] for x in (pixels, changed)]
    assert ((maps[0] - maps[1]).flatten(1).abs().amax(1) > 1e-6).nonzero().flatten().tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(("make", "message"), [
    (lambda: build_backbone("resnet500"), "no backbone resnet500; set --backbone"),
    (lambda: facts_of("resnet500"), "no backbone resnet500; set --backbone"),
    (lambda: build_backbone("efficientnet_b0", 2), "efficientnet_b0 cannot be split.* Found: BatchNormAct2d; set --norm shuffle"),
    (lambda: check_side("beit_base_patch16_224", 448), "beit_base_patch16_224 takes no .* Found: 448 px .*; set --view-size"),
])  # fmt: skip
def test_what_cannot_be_built_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_can_be_built_instead():
    assert build_backbone("efficientnet_b0").channels == {4: 24, 8: 40, 16: 112, 32: 320}
    check_side("beit_base_patch16_224", 224)


def test_without_timm_its_networks_are_refused_and_torchvisions_are_built(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="convnext_atto is none of torchvision's .* pip install timm"):
        build_backbone("convnext_atto")
    build_backbone("resnet18")


def test_an_old_timm_is_refused(monkeypatch):
    monkeypatch.setattr("timm.__version__", "1.0.9.dev0")
    with pytest.raises(ValueError, match="timm 1.0.9.dev0 .* pip install -U timm"):
        build_backbone("convnext_atto")
