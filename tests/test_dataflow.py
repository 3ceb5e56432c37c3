"""What is read from a network's own code holds for each way in which that code may be called."""

import pytest
import torch
from torch import Tensor, fx, nn

import torchfilm as tf
from catalogue import case_id, randomise
from torchfilm.dataflow import first_layer, last_layer, read_by_code
from torchfilm.fold_draft import Affine, Draft, NotExactError
from torchfilm.fold_rules import fold_output
from torchfilm.folding import fold, folded
from torchfilm.tracing import ways


def conditioned(sites: str, model: nn.Module, **options) -> nn.Module:
    tf.condition(model, sites, tf.Vector(7), **options)
    randomise(tf.conditioning(model))
    return model


def z() -> Tensor:
    return torch.randn(1, 7)


class Branch(nn.Module):
    """Code whose layers depend on whether something is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.other = nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(6, 5)


class AddsOnlyAlone(Branch):
    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = self.last(self.first(x))
        return y + 1 if skip is None else y


class ReadsTwiceAlone(Branch):
    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        context = x if context is None else context
        return self.last(self.first(x) * self.other(context))


class AddsWhatOneOfTwoLacks(Branch):
    def forward(self, x: Tensor, a: Tensor | None = None, *, b: Tensor | None = None) -> Tensor:
        y = self.last(self.first(x))
        return y + self.other(x).sum() if a is not None and b is None else y


class AddsByFlag(Branch):
    def forward(self, x: Tensor, plain: bool = True) -> Tensor:
        y = self.last(self.first(x))
        return y + x if plain is False else y


class AddsByIdentity(Branch):
    def forward(self, x: Tensor, mode: object = None) -> Tensor:
        y = self.last(self.first(x))
        return y + x if mode is Branch else y


class AddsByIdentityOfAnEntry(Branch):
    def forward(self, x: Tensor, mode: object = None) -> Tensor:
        y = self.last(self.first(x))
        return y + x if mode is self.__dict__["training"] else y


class AddsByClass(Branch):
    def forward(self, x: Tensor, more: object = 0) -> Tensor:
        y = self.last(self.first(x))
        return y + more if isinstance(more, int) else y


class AddsWithGradients(Branch):
    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.first(x))
        return y + x if torch.is_grad_enabled() else y


class RefusesNone(Branch):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if scale is None:
            raise LookupError("give a scale")
        return self.last(self.first(x))


class AddsWhatItCollects(Branch):
    def forward(self, x: Tensor, *more: Tensor, **options: Tensor) -> Tensor:
        y = self.last(self.first(x))
        return y if options.get("skip") is not None else y + x


class HasManyWays(Branch):
    def forward(self, x: Tensor, a=None, b=None, c=None, d=None, e=None, f=None, g=None) -> Tensor:
        y = self.last(self.first(x))
        return y + x if (a, b, c, d, e, f, g).count(None) == 3 else y


class Fails(Branch):
    def forward(
        self, x: Tensor, temb: Tensor, *more: Tensor, scale: float = 1.0, **options: Tensor
    ) -> Tensor:
        return self.last(self.first(x) * scale + temb[:, None])


class KeepsWhatItGives(Branch):
    def forward(self, x: Tensor) -> Tensor:
        self.features = self.last(self.first(x))
        return self.features


class KeepsWhatItGets(Branch):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = {"all": [x]}
        return self.last(self.first(x))


class StartsWithAFunction(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.abs()))


ASKING = [
    (StartsWithAFunction, None, "last"),
    (AddsOnlyAlone, "first", None),
    (ReadsTwiceAlone, None, "last"),
    (AddsWhatOneOfTwoLacks, None, None),
    (AddsByFlag, None, None),
    (AddsWhatItCollects, None, None),
    (HasManyWays, None, None),
    (AddsByIdentity, None, None),
    (AddsByIdentityOfAnEntry, None, None),
    (AddsByClass, None, None),
    (AddsWithGradients, None, None),
    (RefusesNone, None, None),
    (Fails, "first", "last"),
    (KeepsWhatItGives, "first", None),
    (KeepsWhatItGets, None, "last"),
]


@pytest.mark.parametrize(("build", "first", "last"), ASKING, ids=case_id)
def test_a_layer_counts_only_where_each_way_to_call_the_code_agrees(build, first, last):
    assert (first_layer(build()), last_layer(build())) == (first, last)


def test_a_patched_forward_and_a_watched_identity_are_not_looked_through():
    module = nn.Sequential(nn.Linear(6, 5), nn.Identity())
    assert last_layer(module) == "0"
    module[1].register_forward_hook(lambda _module, _args, y: y.tanh())
    assert last_layer(module) == "1"
    with pytest.raises(NotExactError, match="its Identity has hooks, which would see other numbers"):
        fold_output(Draft(module), module, Affine(torch.rand(5), torch.rand(5)), -1)
    patched = nn.Sequential(nn.Linear(6, 5))
    patched.forward = lambda x: patched[0](x).tanh()
    assert last_layer(patched) is None


class Asks(nn.Module):
    """Code that hands on what its layer gives, and more where something is given: it may be, nobody knows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = self.inner(x)
        return y if skip is None else y + x.relu()


class Alone(Asks):
    """Code that does more where nothing is given."""

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = self.inner(x)
        return y + x.relu() if skip is None else y


@pytest.mark.parametrize("build", [Asks, Alone])
@pytest.mark.parametrize(("where", "reason"), [("input", "not start with"), ("output", "not end with")])
def test_nothing_is_folded_where_code_asks_for_an_argument_and_does_something_else_then(build, where, reason):
    parts = nn.Sequential(nn.Linear(3, 5), build(nn.Linear(5, 5)))
    model, x, cond = conditioned("1", parts, where=where, dim=-1, features=5), torch.randn(2, 3), z()
    with pytest.raises(
        ValueError, match=f"1  {build.__name__} does {reason} a layer.*, however its code may be called"
    ):
        fold(model, cond=cond)
    expected = model(x, cond=cond)
    assert torch.equal(fold(model, cond=cond, leftover="constant")[0](x), expected)
    with folded(model, cond=cond, leftover="constant"):
        assert torch.equal(model(x), expected)


def with_norm(*parts: nn.Module) -> nn.Module:
    model = randomise(nn.Sequential(*parts)).eval()
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return model


class Norms(nn.Module):
    """A convolution and a norm, with something between them where nothing is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv(x)
        return self.head(self.bn(h.relu() if temb is None else h))


class KeepsFeatures(Norms):
    """A convolution whose output somebody may read beside the norm."""

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.conv(x)
        return self.head(self.bn(self.features))


class Passes(nn.Module):
    """Code that is a site and nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        return x


SEPARATE = [
    ("site 1", "1", "output", "0", "2", lambda: (nn.Conv2d(3, 5, 3), Passes(), nn.BatchNorm2d(5))),
    (
        "site around conv",
        "0",
        "output",
        "0.inner",
        "1",
        lambda: (Asks(nn.Conv2d(3, 5, 1)), nn.BatchNorm2d(5)),
    ),
    ("site around norm", "1", "input", "0", "1.inner", lambda: (nn.Conv2d(3, 5, 3), Asks(nn.BatchNorm2d(5)))),
]


@pytest.mark.parametrize(
    ("name", "site", "where", "conv", "norm", "parts"),
    SEPARATE,
    ids=case_id,
)
def test_no_norm_goes_into_a_convolution_across_a_constant(name, site, where, conv, norm, parts):
    model = conditioned(site, with_norm(*parts()), where=where, dim=1, features=5)
    x, cond = torch.randn(2, 3, 7, 11), z()
    options = {"cond": cond, "leftover": "constant"}
    plain, report = fold(model, fuse_norms=True, **options)
    torch.testing.assert_close(plain(x), model(x, cond=cond))
    assert report[site].target == "constant"
    assert report.fused == ()
    with pytest.raises(ValueError, match=rf"got \('{conv}', '{norm}'\): a constant is kept between them"):
        fold(model, fuse_norms=[(conv, norm)], **options)


@pytest.mark.parametrize("build", [Norms, KeepsFeatures])
def test_no_norm_goes_into_a_convolution_where_code_may_do_something_between_them(build):
    model, x, cond = conditioned("head", with_norm(build())[0]), torch.randn(2, 3, 7, 11), z()
    plain, report = fold(model, cond=cond, fuse_norms=True)
    torch.testing.assert_close(plain(x), model(x, cond=cond))
    assert report.fused == ()


class AddsFeatures(Norms):
    """A convolution whose output is read beside the norm."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return self.head(self.bn(h) + h)


class AsksValues(Norms):
    """Code that cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.conv(x if x.sum() > -1e9 else -x)))


def test_given_pairs_are_refused_where_the_code_shows_that_they_are_none():
    given = [["conv", "bn"]]
    model = conditioned("head", with_norm(AddsFeatures())[0])
    with pytest.raises(ValueError, match=r"\('conv', 'bn'\): not bn alone reads what conv gives"):
        fold(model, cond=z(), fuse_norms=given)
    model, x, cond = conditioned("head", with_norm(AsksValues())[0]), torch.randn(2, 3, 7, 11), z()
    plain, report = fold(model, cond=cond, fuse_norms=given)
    assert report.fused == (("conv", "bn"),)
    torch.testing.assert_close(plain(x), model(x, cond=cond))
    with pytest.raises(ValueError, match=r"each module in one pair .*, got 'conv' in several"):
        fold(model, cond=z(), fuse_norms=[*given, ["conv", "bn"]])


def test_a_norm_inside_of_a_constant_goes_into_the_convolution_beside_it():
    inner = with_norm(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    model = conditioned("0", nn.Sequential(inner, nn.ReLU()), dim=1, features=5).eval()
    x, cond = torch.randn(2, 3, 7, 11), z()
    plain, report = fold(model, cond=cond, leftover="constant", fuse_norms=True)
    torch.testing.assert_close(plain(x), model(x, cond=cond))
    assert report.fused == (("0.0", "0.1"),)


class Casts(nn.Module):
    """A norm of its own precision, as others write it, inside of a network."""

    def __init__(self, norm: nn.Module, *, island: bool) -> None:
        super().__init__()
        self.linear, self.norm, self.head, self.island = nn.Linear(6, 6), norm, nn.Linear(6, 2), island

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        h = 2 * h.to(torch.float32) - 1 if self.island else h
        return self.head(self.norm(h).to(self.head.weight.dtype))


NORMS = [
    lambda: nn.LayerNorm(6, elementwise_affine=False),
    lambda: nn.GroupNorm(2, 6, affine=False),
    lambda: nn.BatchNorm1d(6, affine=False).float(),
    lambda: nn.LayerNorm(6, bias=False).float(),
]


@pytest.mark.parametrize("island", [True, False], ids=["float32", "as the network"])
@pytest.mark.parametrize("norm", range(len(NORMS)))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_norm_gets_an_affine_in_the_precision_of_its_features(norm, island, dtype):
    base = Casts(nn.Identity(), island=island).to(dtype)
    base.norm = NORMS[norm]() if island else NORMS[norm]().to(dtype)
    model, x, cond = conditioned("norm", base.eval()), torch.randn(3, 6).to(dtype), z()
    expected = model(x, cond=cond)
    plain, _ = fold(model, cond=cond, inputs=(x,))
    assert plain.norm.weight.dtype == (torch.float32 if island else dtype)
    torch.testing.assert_close(plain(x), expected, rtol=0.1, atol=0.1)
    with folded(model, cond=cond):
        assert torch.equal(model(x), plain(x))


class Reused(nn.Module):
    """Code that calls parts of a block by themselves too."""

    def __init__(self, again: str) -> None:
        super().__init__()
        self.again = again
        self.block = nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.ReLU(), nn.Linear(5, 6)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return y + self.get_submodule(self.again)(x[..., :5]) if self.again else y


@pytest.mark.parametrize("again", ["", "block.1", "block.1.1"])
def test_a_layer_of_a_block_that_is_called_without_the_block_takes_nothing_of_it(again: str):
    model, x, cond = conditioned("block", Reused(again).eval(), dim=-1, features=6), torch.randn(2, 6), z()
    plain, report = fold(model, cond=cond, leftover="constant")
    torch.testing.assert_close(plain(x), model(x, cond=cond))
    assert [site.target == "constant" for site in report.sites] == [bool(again)]
    if again:
        with pytest.raises(
            ValueError, match=r"block  its (Linear|Sequential) is called from outside of it too"
        ):
            fold(model, cond=cond)


class Counts(Branch):
    """Code that changes a buffer in place and draws a random number."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.last(self.first(x) * torch.rand(()))


def test_reading_code_changes_no_buffer_and_draws_no_random_number():
    model, cond = conditioned("0", nn.Sequential(Counts()), dim=-1, features=6), z()
    state = torch.get_rng_state()
    plain, _ = fold(model, cond=cond)
    with folded(model, cond=cond):
        assert torch.equal(torch.get_rng_state(), state)
    assert model[0].steps == plain[0].steps == 0


class AsksDtype(Branch):
    """Code that asks of what kind a weight is, as T5 of transformers does."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.last.weight, Tensor) and self.last.weight.numel() == 0:
            return x
        return self.last(self.first(x).to(self.last.weight.dtype)) * self.last.weight.shape[0]


class KeepsWeight(Branch):
    """Code that keeps a weight where somebody may read its numbers."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.last.weight
        return self.last(self.first(x))


@pytest.mark.parametrize(("build", "count"), [(AsksDtype, 0), (KeepsWeight, 1)])
def test_code_reads_a_weight_where_its_numbers_count(build, count):
    assert len(read_by_code(build())) == count


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_what_is_no_fault_of_the_code_does_not_pass_for_one(error, monkeypatch: pytest.MonkeyPatch):
    def fails(tracer: fx.Tracer, root: nn.Module) -> fx.Graph:
        raise error

    monkeypatch.setattr(fx.Tracer, "trace", fails)
    with pytest.raises(error):
        ways(AddsOnlyAlone())


@pytest.mark.parametrize("pairs", [True, [("0", "1")]], ids=["found", "given"])
def test_a_network_is_traced_once_to_find_the_norms_too(pairs, monkeypatch: pytest.MonkeyPatch):
    traced = []
    monkeypatch.setattr(
        "torchfilm.dataflow.ways", lambda module, *args: traced.append(1) or ways(module, *args)
    )
    model = conditioned("0", nn.Sequential(nn.Conv1d(3, 5, 1), nn.BatchNorm1d(5), nn.ReLU()).eval())
    _, report = fold(model, cond=z(), fuse_norms=pairs)
    assert report.fused == (("0", "1"),)
    assert traced == [1]
