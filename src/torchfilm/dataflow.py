"""Which layer's output goes where, read from the model's own code by `torch.fx`.

Where the code depends on values and cannot be traced, its parts are traced, each alone.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import fx, nn
from torch.fx.proxy import TraceError
from torch.nn.modules import batchnorm

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# What tracing runs into where code looks at values; what else a model's own code raises is its own fault.
_UNTRACEABLE = (
    TraceError,
    TypeError,
    ValueError,
    RuntimeError,
    AttributeError,
    NameError,
    IndexError,
    KeyError,
    AssertionError,
    NotImplementedError,
)


def last_layer(module: nn.Module) -> str | None:
    """Return the name of the layer inside whose output is the module's output, and used nowhere else.

    Layers that hand their input on (Identity, Dropout in evaluation) are looked through. None where the
    module ends with anything else, or cannot be traced.

    Example:
        >>> last_layer(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 5), nn.Identity()))
        '2'
    """
    graph = _trace(module)
    if graph is None:
        return None
    (output,) = (node for node in graph.nodes if node.op == "output")
    node = output.args[0]
    while isinstance(node, fx.Node) and node.op == "call_module" and len(node.users) == 1:
        if not passes(module.get_submodule(str(node.target))):
            return str(node.target) if _calls(graph)[node.target] == 1 else None
        node = node.args[0]
    return None


def first_layer(module: nn.Module) -> str | None:
    """Return the name of the only layer inside that reads the module's first argument, as its own first.

    Looked through and None as for `last_layer`.

    Example:
        >>> first_layer(nn.Sequential(nn.Identity(), nn.Linear(2, 3), nn.ReLU()))
        '1'
    """
    graph = _trace(module)
    node = None if graph is None else next((n for n in graph.nodes if n.op == "placeholder"), None)
    while graph is not None and node is not None and len(node.users) == 1:
        (reader,) = node.users
        if reader.op != "call_module" or reader.args[:1] != (node,) or _calls(graph)[reader.target] > 1:
            return None
        if not passes(module.get_submodule(str(reader.target))):
            return str(reader.target)
        node = reader
    return None


def conv_norm_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Return the names of each convolution (or linear layer) and the BatchNorm that alone reads its output.

    Both are called once, and neither has a second name. Only norms with running statistics count.

    Example:
        >>> conv_norm_pairs(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))
        [('0', '1')]
    """
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    pairs = []
    for prefix, graph in _graphs("", model):
        calls = _calls(graph)
        for node in graph.nodes:
            before = node.args[0] if node.op == "call_module" and len(node.args) == 1 else None
            if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
                continue
            pair = tuple(prefix + str(n.target) for n in (before, node))
            conv, norm = (model.get_submodule(name) for name in pair)
            fits = isinstance(conv, _CONVS + _TRANSPOSED) and isinstance(norm, batchnorm._BatchNorm)
            once = calls[before.target] == calls[node.target] == names[id(conv)] == names[id(norm)] == 1
            if fits and once and norm.running_mean is not None:
                pairs.append((pair[0], pair[1]))
    return pairs


def read_by_code(model: nn.Module) -> set[int]:
    """Return the ids of the tensors that the code of the model reads besides calling their layer.

    As a network that multiplies by the weights of its embedding does. Of code that cannot be traced nothing
    is known.

    Example:
        >>> len(read_by_code(nn.Sequential(nn.Linear(2, 3), nn.ReLU())))
        0
    """
    found = set()
    for prefix, graph in _graphs("", model):
        for target in {str(node.target) for node in graph.nodes if node.op == "get_attr"}:
            owner, _, name = (prefix + target).rpartition(".")
            found.add(id(getattr(_inside(model, owner), name, None)))
    return found - {id(None)}


def passes(module: nn.Module) -> bool:
    """Whether a layer hands its input on: Identity, and Dropout in evaluation."""
    return isinstance(module, nn.Identity) or (
        isinstance(module, nn.modules.dropout._DropoutNd) and not module.training
    )


def _graphs(prefix: str, module: nn.Module) -> Iterator[tuple[str, fx.Graph]]:
    """Yield the graph of the module, or those of its parts where it has none of its own."""
    graph = _trace(module)
    if graph is not None:
        yield prefix, graph
        return
    for name, child in module.named_children():
        yield from _graphs(f"{prefix}{name}.", child)


def _inside(model: Any, path: str) -> Any:
    """Return what is at a path of attributes, None where the tracer put there something of its own."""
    for key in path.split(".") if path else ():
        model = getattr(model, key, None)
    return model


def _trace(module: nn.Module) -> fx.Graph | None:
    """Trace a copy that shares the tensors: code that keeps what it computes would keep proxies."""
    tensors: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    if not list(module.children()):
        return None
    try:
        return fx.Tracer().trace(copy.deepcopy(module, tensors))
    except _UNTRACEABLE:
        return None


def _calls(graph: fx.Graph) -> Counter[Any]:
    return Counter(node.target for node in graph.nodes if node.op == "call_module")
