"""Isolation of networks that are no chain: five steps each, with and without MAN, every trained tensor moves.

That gradients are isolated is seen by the gradients: with all local losses set to 0, no parameter before the last cut
gets one, and with the model's own loss left out, none after it does.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import localgrad
from localgrad import LocalGradError, isolate, man

VOCABULARY, LENGTH, CLASSES = 50, 12, 3
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(1, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * LENGTH, [1] * 8 + [0] * 4])
LABELS = torch.tensor([0, 1])


class NextToken(nn.Module):
    """Cross-entropy of each token's successor, as language models shift their labels."""

    def __init__(self, site: localgrad.Site) -> None:
        super().__init__()
        self.classifier = nn.Linear(site.features[-1], VOCABULARY)

    def forward(self, features: Tensor, targets: Tensor, inputs: Tensor) -> Tensor:
        scores = self.classifier(features)
        if scores.shape[1] != targets.shape[1]:  # an encoder of sound
            return F.cross_entropy(scores.mean(1), targets[:, 0])
        return F.cross_entropy(scores[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


class Pixels(nn.Module):
    """Cross-entropy of each pixel."""

    def __init__(self, site: localgrad.Site) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(site.features[1], CLASSES, 1)

    def forward(self, features: Tensor, targets: Tensor, inputs: Tensor) -> Tensor:
        return F.cross_entropy(F.interpolate(self.classifier(features), targets.shape[1:]), targets)


class FirstObject(nn.Module):
    """Cross-entropy of the class of each image's first object."""

    def __init__(self, site: localgrad.Site) -> None:
        super().__init__()
        self.classifier = nn.Linear(site.features[1], CLASSES)

    def forward(self, features: Tensor, targets: list[dict[str, Tensor]], inputs: Tensor) -> Tensor:
        return F.cross_entropy(self.classifier(features.mean((2, 3))), torch.stack([t["labels"][0] for t in targets]))


def train(
    make: Callable[[], nn.Module],
    example: Any,
    loss_of: Callable[[Any], Tensor],
    *,
    set_targets: Any = None,
    **options: Any,
) -> localgrad.Isolation:
    """Three steps with the options of `isolate`; every trained tensor moves, and gradients are isolated."""
    torch.manual_seed(0)
    model = make().train()
    isolation = isolate(model, example=example, **options)
    parameters = isolation.trainable_parameters()
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.0)

    def run() -> Tensor:
        isolation.targets = set_targets
        if isinstance(example, dict):
            return loss_of(model(**example))
        return loss_of(model(*example) if isinstance(example, tuple) else model(example))

    for _ in range(3):
        run().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(loss.isfinite() for loss in isolation.losses)
    still = [p.shape for p, old in zip(parameters, before, strict=True) if torch.equal(p, old)]
    assert not still
    _check_isolation(isolation, run)
    return isolation


def _check_isolation(isolation: localgrad.Isolation, run: Callable[[], Tensor]) -> None:
    last = len(isolation.objectives)
    local = {p for block in range(last) for p in isolation.trainable_parameters(block)}
    own = set(isolation.trainable_parameters(last))
    (run() * 0).backward()
    assert not any(parameter.grad.any() for parameter in own if parameter.grad is not None)
    assert all(parameter.grad is not None for parameter in local)
    for parameter in local:
        parameter.grad = None
    isolation.backward = lambda loss: (loss * 0).backward()
    run().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in local)
    assert any(parameter.grad.any() for parameter in own if parameter.grad is not None)


both = pytest.mark.parametrize("momentum", [None, man()], ids=["plain", "man"])


@both
@pytest.mark.filterwarnings("ignore:transformer.wte.weight:localgrad.errors.LocalGradWarning")
def test_gpt2(momentum: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=2, n_positions=16)
    example = {"input_ids": TOKENS, "attention_mask": MASK, "labels": TOKENS}
    options = {"cuts": ["transformer.h.0", "transformer.h.1"], "objective": NextToken, "momentum": momentum}
    train(lambda: transformers.GPT2LMHeadModel(config), example, lambda o: o.loss, targets="labels", **options)


@both
def test_llama(momentum: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=1, **SMALL)
    example = {"input_ids": TOKENS, "labels": TOKENS}
    options = {"num_blocks": 3, "objective": NextToken, "momentum": momentum}
    made = train(lambda: transformers.LlamaForCausalLM(config), example, lambda o: o.loss, targets="labels", **options)
    assert "to model.layers.0:" in str(made)


def test_the_checkpointing_of_transformers_works_inside_the_blocks() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=1, **SMALL)
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one of its two names for that is old
            if checkpointed:
                model.gradient_checkpointing_enable()
        example = {"input_ids": TOKENS, "labels": TOKENS}
        options = {"objective": NextToken, "momentum": man(), "targets": "labels", "example": example}
        isolation = isolate(model, ["model.layers.0", "model.layers.1"], **options)
        calls: list[int] = []
        model.model.layers[1].mlp.register_forward_pre_hook(lambda *given, calls=calls: calls.append(1))
        model(**example).loss.backward()
        assert len(calls) == 1 + checkpointed
        found.append([parameter.grad for parameter in isolation.trainable_parameters()])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*found, strict=True))


@both
def test_bert(momentum: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=VOCABULARY, num_labels=CLASSES, **SMALL)
    example = {"input_ids": TOKENS, "attention_mask": MASK, "labels": LABELS}
    options = {"num_blocks": 3, "objective": localgrad.classifier(CLASSES), "momentum": momentum, "targets": "labels"}
    made = train(lambda: transformers.BertForSequenceClassification(config), example, lambda o: o.loss, **options)
    assert "to bert.encoder.layer.0:" in str(made)


@both
def test_vit_of_transformers(momentum: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=CLASSES, **SMALL)
    example = {"pixel_values": IMAGES, "labels": LABELS}
    options = {"num_blocks": 3, "objective": localgrad.classifier(CLASSES), "momentum": momentum, "targets": "labels"}
    train(lambda: transformers.ViTForImageClassification(config), example, lambda o: o.loss, **options)


@both
@pytest.mark.filterwarnings("ignore:shared.weight:localgrad.errors.LocalGradWarning")
def test_t5_is_cut_at_its_encoder_too(momentum: Any) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)
    example = {"input_ids": TOKENS, "attention_mask": MASK, "labels": TOKENS}
    options = {"objective": NextToken, "momentum": momentum, "targets": "labels"}
    cuts = ["encoder.block.0", "encoder", "decoder.block.0"]
    train(lambda: transformers.T5ForConditionalGeneration(config), example, lambda o: o.loss, cuts=cuts, **options)
    with pytest.raises(LocalGradError, match=r"add 'encoder.dropout' to cuts"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.T5ForConditionalGeneration(config)
        isolate(model, ["encoder.block.0", "decoder.block.0"], example=example, **options)


@both
@pytest.mark.filterwarnings("ignore:model.decoder.embed_tokens.weight:localgrad.errors.LocalGradWarning")
def test_whisper(momentum: Any) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    lengths = {"max_source_positions": 24, "max_target_positions": 16}
    marks = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(vocab_size=VOCABULARY, **sizes, **heads, **lengths, **marks)
    example = {"input_features": torch.randn(2, 8, 48), "labels": TOKENS}
    train(
        lambda: transformers.WhisperForConditionalGeneration(config),
        example,
        lambda output: output.loss,
        cuts=["model.encoder.layers.0", "model.encoder", "model.decoder.layers.0"],
        objective=NextToken,
        momentum=momentum,
        targets="labels",
    )


@both
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_lora_copies_share_the_frozen_weights(momentum: Any) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **SMALL)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")

    def make() -> nn.Module:
        return peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)

    example = {"input_ids": TOKENS, "labels": TOKENS}
    options = {"num_blocks": 3, "objective": NextToken, "momentum": momentum, "targets": "labels"}
    made = train(make, example, lambda output: output.loss, **options)
    trained = sum(p.numel() for p in make().parameters() if p.requires_grad)
    heads = sum(p.numel() for p in made.objectives.parameters())
    copies = 0 if momentum is None else 2 * trained // SMALL["num_hidden_layers"]
    assert sum(p.numel() for p in made.trainable_parameters()) == trained + heads + copies


class GPT(nn.Module):
    """As nanoGPT: the output layer's weights are the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, 16), nn.Embedding(LENGTH, 16)
        layers = [nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(3)]
        self.h, self.ln_f = nn.ModuleList(layers), nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, VOCABULARY, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        features = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        for layer in self.h:
            features = layer(features, src_mask=mask, is_causal=True)
        scores = self.lm_head(self.ln_f(features))
        loss = None if targets is None else F.cross_entropy(scores.flatten(0, 1), targets.flatten())
        return scores, loss


@both
def test_tied_embeddings_are_trained_by_the_last_block_alone(momentum: Any) -> None:
    options = {"cuts": ["h.0", "h.1"], "objective": NextToken, "momentum": momentum, "targets": "targets"}
    with pytest.warns(UserWarning, match=r"wte.weight is used by blocks 1, 3: block 3 alone trains it"):
        train(GPT, (TOKENS, TOKENS.roll(-1, 1)), lambda output: output[1], **options)
    torch.manual_seed(0)
    model = GPT()
    with pytest.warns(UserWarning, match="block 3 alone"):
        isolation = isolate(model, example=(TOKENS, TOKENS.roll(-1, 1)), **options)
    kept = {}
    model.h[1].register_forward_hook(lambda module, args, output: kept.update(features=output.detach()))
    loss = model(TOKENS, TOKENS.roll(-1, 1))[1]
    loss.backward()
    last = copy.deepcopy(model)
    features = kept["features"]
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    scores = last.lm_head(last.ln_f(last.h[2](features, src_mask=mask, is_causal=True)))
    expected = torch.autograd.grad(F.cross_entropy(scores.flatten(0, 1), TOKENS.roll(-1, 1).flatten()), last.wte.weight)
    assert torch.allclose(model.wte.weight.grad, expected[0], atol=1e-6)
    assert model.wte.weight.requires_grad
    isolation.remove()


def pixel_classes() -> Tensor:
    return torch.randint(0, CLASSES, (2, 32, 32), generator=torch.Generator().manual_seed(0))


@both
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        ("fcn_resnet50", ["backbone.layer2", "backbone.layer3"]),
        ("deeplabv3_mobilenet_v3_large", ["backbone.6", "backbone.12"]),
        ("lraspp_mobilenet_v3_large", ["backbone.2", "backbone.4", "backbone.10"]),
    ],
)
def test_segmentation_of_torchvision(name: str, cuts: list[str], momentum: Any) -> None:
    build = getattr(torchvision.models.segmentation, name)
    train(
        lambda: build(weights=None, weights_backbone=None, num_classes=CLASSES),
        IMAGES,
        lambda output: sum(F.cross_entropy(each, pixel_classes()) for each in output.values()),
        set_targets=pixel_classes(),
        cuts=cuts,
        objective=Pixels,
        momentum=momentum,
    )


@both
@pytest.mark.slow
@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "fcos_resnet50_fpn", "fasterrcnn_resnet50_fpn"])
@pytest.mark.filterwarnings("ignore:Changing trainable_backbone_layers")
def test_detectors_with_their_losses_inside_forward(name: str, momentum: Any) -> None:
    images = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0], [10.0, 10.0, 30.0, 50.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in images]
    build = getattr(torchvision.models.detection, name)
    sizes = {"min_size": 64, "max_size": 64, "trainable_backbone_layers": 5}
    cuts = ["backbone.body.layer2", "backbone.body.layer3"]
    if name.startswith("faster"):
        cuts = ["backbone.body.layer1", *cuts]  # its pyramid reads this level too
    train(
        lambda: build(weights=None, weights_backbone=None, num_classes=CLASSES, **sizes),
        (images, targets),
        lambda losses: sum(losses.values()),
        cuts=cuts,
        objective=FirstObject,
        momentum=momentum,
        targets="targets",
    )


class Level(nn.Sequential):
    def __init__(self, before: int, after: int) -> None:
        super().__init__(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True))


class UNet(nn.Module):
    """Two levels; the way down is pooled by a module once and by a function once."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = Level(3, 8), Level(8, 12), Level(12, 16)
        self.pool = nn.MaxPool2d(2)
        self.up2, self.join2 = nn.ConvTranspose2d(16, 12, 2, 2), Level(24, 12)
        self.up1, self.join1 = nn.ConvTranspose2d(12, 8, 2, 2), Level(16, 8)
        self.out = nn.Conv2d(8, CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        one = self.down1(images)
        two = self.down2(self.pool(one))
        features = self.bottom(F.max_pool2d(two, 2))
        features = self.join2(torch.cat([self.up2(features), two], 1))
        return self.out(self.join1(torch.cat([self.up1(features), one], 1)))


@both
def test_a_u_net_is_cut_at_every_level(momentum: Any) -> None:
    options = {"objective": Pixels, "momentum": momentum, "set_targets": pixel_classes()}
    cuts = ["down1", "down2", "bottom", "join2"]
    train(UNet, IMAGES, lambda output: F.cross_entropy(output, pixel_classes()), cuts=cuts, **options)


class Stack(nn.Module):
    """LSTMs one after another, whose outputs are tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(8, 8, batch_first=True) for _ in range(4))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, sequence: Tensor) -> Tensor:
        for layer in self.layers:
            sequence, _ = layer(sequence)
        return self.fc(sequence[:, -1])


@both
def test_a_stack_of_lstms(momentum: Any) -> None:
    options = {"num_blocks": 4, "objective": localgrad.classifier(CLASSES), "momentum": momentum}
    train(Stack, torch.randn(2, 5, 8), lambda output: F.cross_entropy(output, LABELS), set_targets=LABELS, **options)


@both
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 4, "drop_path_rate": 0.3}),
        ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 4}),
        ("beit_base_patch16_224", {"img_size": 32, "depth": 4, "embed_dim": 48, "num_heads": 2}),
        ("vit_small_patch16_dinov3", {"img_size": 32, "depth": 4, "embed_dim": 48, "num_heads": 2}),
    ],
)
def test_timm_networks_that_are_no_chain_or_skip_at_random(name: str, options: dict[str, Any], momentum: Any) -> None:
    timm = pytest.importorskip("timm")
    images = IMAGES[:, :, : options["img_size"], : options["img_size"]]
    made = train(
        lambda: timm.create_model(name, num_classes=CLASSES, **options),
        images,
        lambda output: F.cross_entropy(output, LABELS),
        set_targets=LABELS,
        num_blocks=4,
        objective=localgrad.classifier(CLASSES),
        momentum=momentum,
    )
    assert "to blocks.0:" in str(made)


class Experts(nn.Module):
    """A mixture of experts that keeps its balance loss on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 2), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.balance: Tensor | None = None

    def forward(self, features: Tensor) -> Tensor:
        shares = self.gate(features).softmax(-1)
        self.balance = 2 * (shares.mean(0) ** 2).sum()
        mixed = sum(shares[:, i : i + 1] * expert(features) for i, expert in enumerate(self.experts))
        return features + F.relu(mixed)


def balanced(site: localgrad.Site) -> nn.Module:
    """A classifier whose loss includes the balance of the block's experts."""
    head = localgrad.classifier(CLASSES)(site)
    experts = site.model[site.index + 1]

    class WithBalance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.of = head, (experts,)

        def forward(self, features: Tensor, targets: Tensor, inputs: Tensor) -> Tensor:
            return self.head(features, targets, inputs) + 0.1 * self.of[0].balance

    return WithBalance()


@both
def test_a_balance_loss_that_stays_on_its_module_joins_the_local_loss(momentum: Any) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), Experts(), Experts(), nn.Linear(8, CLASSES))

    inputs = torch.randn(2, 8)
    options = {"cuts": ["1"], "objective": balanced, "momentum": momentum}
    train(make, inputs, lambda output: F.cross_entropy(output, LABELS), set_targets=LABELS, **options)
    torch.manual_seed(0)
    model = make()
    isolation = isolate(model, example=inputs, **options)
    isolation.targets = LABELS
    model(inputs).sum().backward()
    with_balance = model[1].gate.weight.grad.clone()
    model.zero_grad()
    isolation.objectives[0].of[0].forward = lambda features: _without_balance(model[1], features)
    isolation.targets = LABELS
    model(inputs).sum().backward()
    assert not torch.allclose(with_balance, model[1].gate.weight.grad)


def _without_balance(module: Experts, features: Tensor) -> Tensor:
    output = Experts.forward(module, features)
    module.balance = torch.zeros(())
    return output
