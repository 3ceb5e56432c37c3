"""Which layer's output goes where, read from the model's own code, as torchfilm.tracing traces it.

Code whose branches depend on its arguments counts only where all branches agree. Where it cannot be traced,
its parts are traced, each alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import batchnorm

from torchfilm.channels import lineage
from torchfilm.tracing import Ways, ways

Code = Sequence[tuple[str, Ways]]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_CASTS = ("float", "half", "bfloat16", "double", "to", "type", "type_as")
_NO_NUMBERS = ("dtype", "device", "shape", "ndim")
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def last_layer(module: nn.Module) -> str | None:
    """Return the name of the layer inside whose output is the module's output, and used nowhere else.

    Layers that hand their input on (Identity, Dropout in evaluation) are looked through. None where the
    module ends with anything else, or, called in another way, with another layer, or cannot be traced.

    Example:
        >>> last_layer(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 5), nn.Identity()))
        '2'
    """
    return _agreed(module, ways(module), _last)


def first_layer(module: nn.Module) -> str | None:
    """Return the name of the only layer inside that reads the module's first argument, as its own first.

    Looked through and None as for `last_layer`.

    Example:
        >>> first_layer(nn.Sequential(nn.Identity(), nn.Linear(2, 3), nn.ReLU()))
        '1'
    """
    return _agreed(module, ways(module, takes_first=True), _first)


def conv_norm_pairs(
    model: nn.Module, code: Code | None = None, kept: Collection[nn.Module] = ()
) -> list[tuple[str, str]]:
    """Return the names of each convolution (or linear layer) and the BatchNorm that alone reads its output.

    Both are called once, and neither has a second name. Only norms with running statistics count.

    Args:
        model: any network.
        code: its `code_of`, to trace nothing again; not used where modules are kept.
        kept: modules inside that change what they get or give: a pair is inside of one or outside of it.

    Example:
        >>> conv_norm_pairs(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))
        [('0', '1')]
    """
    roots = [("", model), *((f"{name}.", module) for name, module in model.named_modules() if module in kept)]
    if kept or code is None:
        code = [part for start, root in roots for part in _parts(start, root, kept)]
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    found: dict[tuple[str, str], None] = {}
    seen: list[tuple[list[tuple[str, str]], set[str]]] = []
    for prefix, part in code:
        pairs = [_pairs(model, names, prefix, graph) for graph in part.graphs]
        called = [{prefix + str(target) for target in _calls(graph)} for graph in part.graphs]
        seen += zip(pairs, called, strict=True)
        if part.complete:
            found |= {pair: None for one in pairs for pair in one}
    return [pair for pair in found if all(pair in pairs or called.isdisjoint(pair) for pairs, called in seen)]


def code_of(model: nn.Module) -> Code:
    """Return the graphs of a network's code, for what reads them all."""
    return list(_parts("", model))


def shows(code: Code, *names: str) -> bool:
    """Tell whether the code of a network shows each way in which the modules with these names are called.

    That is, whether some module around all of them could be traced.

    Example:
        >>> shows(code_of(nn.Sequential(nn.Linear(2, 3), nn.ReLU())), "0", "1")
        True
    """
    return any(part.complete and all(name.startswith(prefix) for name in names) for prefix, part in code)


def read_by_code(model: nn.Module, code: Code | None = None) -> set[int]:
    """Return the ids of the tensors whose numbers the code of the model reads besides calling their layer.

    As a network that multiplies by the weights of its embedding does. To ask for the dtype, device or shape
    is to read no number. Of code that cannot be traced nothing is known.

    Example:
        >>> len(read_by_code(nn.Sequential(nn.Linear(2, 3), nn.ReLU())))
        0
    """
    found = set()
    for prefix, part in code or code_of(model):
        nodes = [node for graph in part.graphs for node in graph.nodes]
        for target in {str(node.target) for node in nodes if node.op == "get_attr" and _numbers_read(node)}:
            owner, _, name = (prefix + target).rpartition(".")
            found.add(id(getattr(_inside(model, owner), name, None)))
    return found - {id(None)}


def surroundings(model: nn.Module, code: Code | None = None) -> dict[nn.Module, set[frozenset[nn.Module]]]:
    """Return the modules whose code runs around each call of a module, its own included, as far as it shows.

    Example:
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(2, 3)), nn.ReLU())
        >>> [len(around) for around in surroundings(model)[model[0][0]]]
        [3]
    """
    found: dict[nn.Module, set[frozenset[nn.Module]]] = {}
    for prefix, part in code or code_of(model):
        for node in (node for graph in part.graphs for node in graph.nodes if node.op == "call_module"):
            around = lineage(model, prefix[:-1])
            for path, _ in node.meta.get("nn_module_stack", {}).values():
                around.append(model.get_submodule(prefix + path))
                found.setdefault(around[-1], set()).add(frozenset(around))
    return found


def fed_in_float32(model: nn.Module, code: Code | None = None) -> set[nn.Module]:
    """Return the layers that the code of a network in half precision calls with features in float32 only.

    As seen from what it casts, `x.float()` or `x.to(torch.float32)`, and from layers that are float32
    themselves. A norm without an affine, which has no numbers of its own, does not tell.

    Example:
        >>> fed_in_float32(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3, elementwise_affine=False)))
        set()
    """
    if not any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in model.parameters()):
        return set()
    fed: dict[nn.Module, bool] = {}
    for prefix, part in code or code_of(model):
        for graph in part.graphs:
            wide: set[fx.Node] = set()
            for node in graph.nodes:
                inner = model.get_submodule(prefix + str(node.target)) if node.op == "call_module" else None
                inputs_wide = not wide.isdisjoint(node.all_input_nodes)
                if inner is not None:
                    fed[inner] = fed.get(inner, True) and inputs_wide
                if _gives_float32(node, inner, inputs_wide=inputs_wide):
                    wide.add(node)
    return {module for module, only in fed.items() if only}


def _gives_float32(node: fx.Node, inner: nn.Module | None, *, inputs_wide: bool) -> bool:
    """Whether the value of a node is float32: by a cast, by the numbers of a layer, else by what goes in."""
    if node.op == "call_method" and node.target in _CASTS:
        return node.target == "float" or torch.float32 in (*node.args, *node.kwargs.values())
    own = () if inner is None else (*inner.parameters(), *inner.buffers())
    dtype = next((tensor.dtype for tensor in own if tensor.is_floating_point()), None)
    return inputs_wide if dtype is None else dtype == torch.float32


def _numbers_read(node: fx.Node) -> bool:
    """Whether anything but attributes that hold no numbers is read of a tensor, or may be later."""
    return "stored" in node.meta or not all(
        user.target is getattr and user.args[1] in _NO_NUMBERS for user in node.users
    )


def passes(module: nn.Module) -> bool:
    """Whether a layer of torch's, watched by no hook, hands its input on: Identity, Dropout in evaluation."""
    if not type(module).__module__.startswith("torch.") or module._forward_hooks or module._forward_pre_hooks:
        return False
    return isinstance(module, nn.Identity) or (
        isinstance(module, nn.modules.dropout._DropoutNd) and not module.training
    )


def _agreed(module: nn.Module, found: Ways, read: Callable[[nn.Module, fx.Graph], str | None]) -> str | None:
    """Return what all graphs of a module say, None where they differ or are not all."""
    names = {read(module, graph) for graph in found.graphs}
    return names.pop() if found.complete and len(names) == 1 else None


def _last(module: nn.Module, graph: fx.Graph) -> str | None:
    (output,) = (node for node in graph.nodes if node.op == "output")
    node = output.args[0]
    while isinstance(node, fx.Node) and node.op == "call_module" and _read_once(node):
        if not passes(module.get_submodule(str(node.target))):
            return str(node.target) if _calls(graph)[node.target] == 1 else None
        node = node.args[0]
    return None


def _first(module: nn.Module, graph: fx.Graph) -> str | None:
    node = next((node for node in graph.nodes if node.op == "placeholder"), None)
    while node is not None and _read_once(node):
        (reader,) = node.users
        if reader.op != "call_module" or reader.args[:1] != (node,) or _calls(graph)[reader.target] > 1:
            return None
        if not passes(module.get_submodule(str(reader.target))):
            return str(reader.target)
        node = reader
    return None


def _read_once(node: fx.Node) -> bool:
    """Whether one node alone reads a value, which is not kept on a module either."""
    return len(node.users) == 1 and "stored" not in node.meta


def _pairs(model: nn.Module, names: Counter[int], prefix: str, graph: fx.Graph) -> list[tuple[str, str]]:
    """Return the pairs in a graph of the model's part at the prefix; `names` counts those of a module."""
    calls, pairs = _calls(graph), []
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and len(node.args) == 1 else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or not _read_once(before):
            continue
        first, second = (prefix + str(n.target) for n in (before, node))
        conv, norm = model.get_submodule(first), model.get_submodule(second)
        fits = isinstance(conv, _CONVS + _TRANSPOSED) and isinstance(norm, batchnorm._BatchNorm)
        once = calls[before.target] == calls[node.target] == names[id(conv)] == names[id(norm)] == 1
        if fits and once and norm.running_mean is not None:
            pairs.append((first, second))
    return pairs


def _parts(prefix: str, module: nn.Module, kept: Collection[nn.Module] = ()) -> Iterator[tuple[str, Ways]]:
    """Yield the graphs of the module, and those of its parts where its own are not all."""
    found = ways(module, kept)
    yield prefix, found
    if not found.complete:
        for name, child in module.named_children():
            yield from _parts(f"{prefix}{name}.", child, kept)


def _inside(model: Any, path: str) -> Any:
    """Return what is at a path of attributes, None where the tracer put there something of its own."""
    for key in path.split(".") if path else ():
        model = getattr(model, key, None)
    return model


def _calls(graph: fx.Graph) -> Counter[Any]:
    return Counter(node.target for node in graph.nodes if node.op == "call_module")
