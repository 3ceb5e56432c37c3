"""Networks that others wrote, made from their configurations: transformers, diffusers, torch_geometric."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import torchfilm as tf
from catalogue import randomise
from torchfilm.converters import as_generator

# Importing them warns, each in its own way.
pytestmark = [pytest.mark.plain, pytest.mark.filterwarnings("ignore")]

IDS = torch.randint(31, (2, 7), generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def diffusers() -> ModuleType:
    return pytest.importorskip("diffusers")


def check(
    model: nn.Module, sites: object, run: Callable[..., Tensor], names: list[str], **options: object
) -> None:
    """Check the whole promise: same bits and keys, each sample hears its own condition, exact removal."""
    model, z = randomise(model).eval(), torch.randn(2, 13)
    keys = list(model.state_dict())
    with torch.no_grad():
        plain = run(model)
    assert [site.name for site in tf.find(model, sites, **options)] == names
    tf.condition(model, sites, tf.Vector(13), **options)
    assert [key for key in model.state_dict() if not key.startswith("film.")] == keys
    with torch.no_grad():
        assert torch.equal(run(model, cond=z), plain)
        randomise(model.film)
        heard = run(model, cond=z)
        second = run(model, cond=torch.stack([z[0], z[1] + 1]))
        assert not torch.allclose(heard, plain)
        torch.testing.assert_close(second[0], heard[0])
        assert not torch.allclose(second[1], heard[1])
        with pytest.raises(ValueError, match="expected an active condition"):
            run(model)
        torch.testing.assert_close(run(copy.deepcopy(model), cond=z), heard)
        tf.remove(model)
        assert torch.equal(run(model), plain)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("sites", ["preset", "attention"])
def test_a_vision_transformer_of_transformers_listens(transformers: ModuleType, sites: str):
    model = transformers.ViTModel(transformers.ViTConfig(**SIZES, image_size=8, patch_size=4))
    x = torch.randn(2, 3, 8, 8)

    def run(model, **cond):
        return model(x, **cond).last_hidden_state

    if sites == "preset":
        names = ["layers.0.layernorm_after", "layers.1.layernorm_after"]
        check(model, tf.preset("vit"), run, names)
    else:  # a block of others that returns a tuple, its channels unknown
        names = ["layers.0.attention", "layers.1.attention"]
        check(model, r"layers\.\d\.attention", run, names, dim=-1, features=12)


@pytest.mark.parametrize("sites", ["preset", "layers"])
def test_bert_listens(transformers: ModuleType, sites: str):
    model = transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=31))

    def run(model, **cond):
        return model(IDS, **cond).last_hidden_state

    if sites == "preset":
        names = [f"encoder.layer.{i}.output.LayerNorm" for i in range(2)]
        check(model, tf.preset("bert"), run, names)
    else:
        names = ["encoder.layer.0", "encoder.layer.1"]
        check(model, r"encoder\.layer\.\d", run, names, dim=-1, features=12, where="input")


def test_an_efficientnet_of_transformers_listens(transformers: ModuleType):
    config = transformers.EfficientNetConfig(width_coefficient=0.2, depth_coefficient=0.2, hidden_dim=256)
    model, x = transformers.EfficientNetModel(config), torch.randn(2, 3, 64, 64)

    def run(model, **cond):
        return model(x, **cond).last_hidden_state

    widths = [block.projection.project_bn.num_features for block in model.encoder.blocks]
    assert [site.features for site in tf.find(model, tf.preset("efficientnet"))] == widths
    check(model, tf.preset("efficientnet"), run, [f"encoder.blocks.{i}" for i in range(len(widths))])


@pytest.fixture
def llama(transformers: ModuleType) -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=1, vocab_size=31, pad_token_id=0)
    return randomise(transformers.LlamaForCausalLM(config)).eval()


def test_llama_listens(llama: nn.Module):
    names = [f"model.layers.{i}.post_attention_layernorm" for i in range(2)]
    check(llama, tf.preset("llama"), lambda model, **cond: model(IDS, **cond).logits, names)


def test_llama_generates_under_a_condition(llama: nn.Module):
    options = {"max_new_tokens": 5, "do_sample": False}
    plain = llama.generate(IDS, **options)
    tf.condition(llama, tf.preset("llama"), tf.Vector(13))
    z = torch.randn(2, 13)
    with tf.using(llama, cond=z):
        assert torch.equal(llama.generate(IDS, **options), plain)
        randomise(llama.film)
    by_hand = IDS
    with torch.no_grad():
        for _ in range(5):
            last = llama(by_hand, cond=z, use_cache=False).logits[:, -1:].argmax(dim=-1)
            by_hand = torch.cat([by_hand, last], dim=1)
    with tf.using(llama, cond=z):
        generated = llama.generate(IDS, **options)
    assert torch.equal(generated, by_hand[:, : generated.shape[1]])
    assert not torch.equal(generated, plain)
    with tf.using(llama, cond=z.repeat_interleave(3, dim=0)):
        assert llama.generate(IDS, num_beams=3, **options).shape[0] == 2
    with tf.unconditioned(llama):
        assert torch.equal(llama.generate(IDS, **options), plain)


@pytest.mark.parametrize("kind", ["tensor", "masked", "dict", "tuple"])
@pytest.mark.parametrize("within", ["cond=", "using"])
@pytest.mark.parametrize(
    "times", [{"num_beams": 3}, {"do_sample": True, "top_k": 1, "num_return_sequences": 3}]
)
def test_llama_generates_several_sequences_per_condition(
    llama, kind: str, within: str, times: dict[str, int]
):
    z, present = torch.randn(2, 4, 13), torch.tensor([True, False])
    encoder, cond = {
        "tensor": (tf.Vector(13), z[:, 0]),
        "masked": (tf.Maybe(tf.Vector(13)), tf.Masked(z[:, 0], present)),
        "dict": (tf.Several({"a": tf.Vector(13)}), {"a": z[:, 0]}),
        "tuple": (tf.Tokens(13), (z, present[:, None] | (torch.arange(4) < 2))),
    }[kind]
    randomise(tf.condition(llama, tf.preset("llama"), encoder, repeat="any").film)
    options = {"max_new_tokens": 5, "eos_token_id": None, **times}
    if within == "cond=":
        generated = llama.generate(IDS, cond=cond, **options)
    else:
        with tf.using(llama, cond=cond):
            generated = llama.generate(IDS, **options)
    for i, some in enumerate(generated.chunk(2)):
        with tf.using(llama, cond=torch.utils._pytree.tree_map(lambda leaf, i=i: leaf[i : i + 1], cond)):
            assert torch.equal(llama.generate(IDS[i : i + 1], **options), some)


def test_llama_hears_the_condition_again_when_it_recomputes(llama: nn.Module):
    tf.condition(llama, tf.preset("llama"), tf.Vector(13))
    z = torch.randn(2, 13)
    randomise(llama.film)
    llama.train()
    llama(IDS, labels=IDS, cond=z).loss.backward()
    expected = [p.grad.clone() for p in llama.film.parameters()]
    llama.zero_grad()
    context = {"use_reentrant": False, "context_fn": tf.checkpoint_context(llama)}
    llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs=context)
    llama(IDS, labels=IDS, cond=z).loss.backward()
    for p, grad in zip(llama.film.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_a_saved_llama_keeps_the_name_of_its_architecture(llama: nn.Module, tmp_path: Path):
    tf.condition(llama, tf.preset("llama"), tf.Vector(13))
    llama.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_the_unet_of_diffusers_listens(diffusers: ModuleType):
    model = diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    )
    x, time = torch.randn(2, 3, 8, 8), torch.tensor([3, 7])

    def run(model, **cond):
        return model(x, time, **cond).sample

    blocks = ["down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1"]
    resnets = [f"{block}.resnets.{i}" for block in blocks for i in range(1 + block.startswith("up"))]
    names = [f"{name}.norm2" for name in (*resnets, "mid_block.resnets.0", "mid_block.resnets.1")]
    check(model, tf.preset("unet"), run, names)
    check(model, "mid_block", run, ["mid_block"], dim=1, features=16)


def diffusion_transformer(diffusers: ModuleType) -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=6,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=5,
        norm_num_groups=1,
    )


def test_the_diffusion_transformer_of_diffusers_listens(diffusers: ModuleType):
    model = diffusion_transformer(diffusers)
    x, time, labels = torch.randn(2, 4, 8, 8), torch.tensor([3, 7]), torch.tensor([1, 2])

    def run(model, **cond):
        return model(x, timestep=time, class_labels=labels, **cond).sample

    names = [f"transformer_blocks.{i}.norm3" for i in range(2)]
    check(model, tf.preset("dit"), run, names)
    names = [f"transformer_blocks.{i}.ff" for i in range(2)]
    check(model, r".*\.ff", run, names, where="input", dim=-1, features=12)


def test_the_projections_of_a_diffusion_transformer_of_diffusers_become_a_generator(diffusers: ModuleType):
    model = randomise(diffusion_transformer(diffusers).eval())
    blocks = model.transformer_blocks
    blocks[1].norm1.emb.load_state_dict(blocks[0].norm1.emb.state_dict())  # one condition for all blocks
    given = torch.randn(2, 4, 8, 8), torch.tensor([3, 7]), torch.tensor([1, 2])
    expected = model(*given).sample
    z = blocks[0].norm1.emb(*given[1:], hidden_dtype=torch.float32)
    projections, gates = {}, {}
    for i, block in enumerate(blocks):
        norms = f"transformer_blocks.{i}.norm1.norm", f"transformer_blocks.{i}.norm3"
        ends = f"transformer_blocks.{i}.attn1", f"transformer_blocks.{i}.ff"
        projections[norms] = copy.deepcopy(block.norm1.linear)
        gates.update(zip(norms, ends, strict=True))
        block.norm1.linear.weight.data.zero_()
        block.norm1.linear.bias.data = torch.tensor([0.0, 0, 1, 0, 0, 1]).repeat_interleave(12)
    assert not torch.allclose(model(*given).sample, expected)
    generator = as_generator(projections, "diffusers/AdaLayerNormZero", gates=gates)
    sites = tf.find(model, [*gates]) + tf.find(model, [*gates.values()], dim=-1, features=12)
    tf.condition(model, sites, tf.Vector(12), generator=generator)
    torch.testing.assert_close(model(*given, cond=z).sample, expected)


def test_a_graph_network_hears_one_condition_for_each_graph():
    geometric = pytest.importorskip("torch_geometric.nn")

    class Graphs(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = geometric.GCNConv(3, 6)
            self.norm = geometric.BatchNorm(6)
            self.last = geometric.GCNConv(6, 5)

        def forward(self, x, edges, batch):
            x = self.last(self.norm(self.first(x, edges)).relu(), edges)
            return geometric.global_mean_pool(x, batch)

    x, batch = torch.randn(7, 3), torch.tensor([0, 0, 0, 1, 1, 1, 1])
    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [1, 2, 0, 4, 5, 6, 3]])

    def run(model, cond=None):
        return model(x, edges, batch, **({} if cond is None else {"cond": cond[batch]}))

    check(Graphs(), "first", run, ["first"], dim=-1, features=6)
    check(Graphs(), r"norm\.module", run, ["norm.module"])
