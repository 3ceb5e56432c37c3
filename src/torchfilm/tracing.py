"""The graphs of a module's own code by `torch.fx`, one for each way in which others may call it.

Tracing puts a stand-in in the place of each argument, for which `x is None` is always false: one trace sees
one branch of code that asks so, and a call may take the other. So a module is traced with each optional
argument given, left out and None, in all combinations, and what is to hold has to hold in all of its graphs.
"""

from __future__ import annotations

import copy
import dis
import inspect
import itertools
import math
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx import _symbolic_trace
from torch.utils import _pytree as pytree

from torchfilm.restoring import same_chance
from torchfilm.signatures import signature_of
from torchfilm.sites import is_patched

# What tracing runs into where code looks at values; what else a model's own code raises is its own fault.
_UNTRACEABLE = (
    TypeError,
    ValueError,
    RuntimeError,
    AttributeError,
    NameError,
    IndexError,
    KeyError,
    AssertionError,
)
# Each way costs a copy of the module's structure and a trace of it: milliseconds for a block.
_MOST_WAYS = 64
_GIVEN = object()
# torch.fx changes `nn.Module` for all threads, so that two traces at once would undo each other's change.
_TRACING = threading.RLock()
_OF_MODULES = {"_parameters", "_buffers", "_modules"}
_ASKS = {"isinstance", "issubclass", "is_grad_enabled", "is_inference_mode_enabled"}


@dataclass(frozen=True)
class Ways:
    """How the code of a module runs.

    Args:
        graphs: one for each way to call it that could be traced.
        complete: whether these are all of them.
    """

    graphs: tuple[fx.Graph, ...]
    complete: bool


def ways(module: nn.Module, leaves: Collection[nn.Module] = (), *, takes_first: bool = False) -> Ways:
    """Trace a module for each way in which it may be called.

    A way on which the code fails for a None is left out: nobody calls it so. The graphs are not complete
    where code cannot be traced, where there are more than 64 ways, where it uses what it collects in `*args`
    or `**kwargs`, which may be anything, and where `forward` asks what a stand-in cannot answer: whether
    something `is` another thing than None, of which class it is, or whether gradients are on.

    Args:
        module: any module.
        leaves: modules inside whose code stays closed, beside torch's own layers.
        takes_first: whether the first argument is always given.

    Example:
        >>> len(ways(nn.Sequential(nn.Linear(2, 3))).graphs)
        1
    """
    if not list(module.children()) or is_patched(module):
        return Ways((), complete=False)
    try:
        parameters = list(signature_of(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return Ways((), complete=False)
    always = [i == 0 and (takes_first or one.default is one.empty) for i, one in enumerate(parameters)]
    choices = [_choices(one, always=is_given) for one, is_given in zip(parameters, always, strict=True)]
    complete = math.prod(map(len, choices)) <= _MOST_WAYS and not _branches_unseen(module)
    # All given and none given come first: these are traced also where the others are too many.
    both = [(0,) * len(choices), tuple(min(1, len(each) - 1) for each in choices)]
    every = itertools.product(*[range(len(each)) for each in choices]) if complete else ()
    graphs = []
    for picks in dict.fromkeys([*both, *every]):
        if picks not in both and not complete:
            break
        constants = {
            one.name: each[pick]
            for one, each, pick in zip(parameters, choices, picks, strict=True)
            if each[pick] is not _GIVEN
        }
        try:
            graph = _trace(module, leaves, constants)
        except (MemoryError, torch.OutOfMemoryError):  # say nothing about the code
            raise
        except _UNTRACEABLE as error:
            fails_for_none = "NoneType" in str(error) and any(one is None for one in constants.values())
            complete = complete and fails_for_none
        except Exception:  # the code's own, of whatever class, on a way that nobody may go
            if not constants:
                raise
            complete = False
        else:
            graphs.append(graph)
            complete = complete and not _uses_collected(graph)
    return Ways(tuple(graphs), complete)


class _Tracer(fx.Tracer):
    """Trace what this thread runs, with some arguments fixed, and some modules closed."""

    def __init__(self, leaves: Collection[nn.Module], constants: dict[str, Any]) -> None:
        super().__init__()
        self.leaves = leaves
        self.constants = constants
        self.thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Call a module: in another thread as if nothing were traced, unless the traced code runs there."""
        if threading.get_ident() != self.thread:
            given = pytree.tree_leaves((args, kwargs))
            if not any(isinstance(one, fx.Proxy) for one in given):
                return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Return an attribute of a module: in another thread as if nothing were traced."""
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the code of a module stays closed."""
        return m in self.leaves or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, *given: Any, **named: Any) -> tuple[Any, list[Any]]:
        """Return what forward is called with; a fixed argument keeps its placeholder, which nobody uses."""
        fn, args = super().create_args_for_root(*given, **named)
        return fn, [
            self.constants.get(str(arg.node.target), arg) if isinstance(arg, fx.Proxy) else arg
            for arg in args
        ]


def _choices(parameter: inspect.Parameter, *, always: bool) -> tuple[Any, ...]:
    """Return what a call may have for a parameter: what is given, what it is when left out, None."""
    default = parameter.default
    if always or parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
        return (_GIVEN,)
    if default is inspect.Parameter.empty or default is None:
        return (_GIVEN, None)
    return (_GIVEN, default, None, *((not default,) if isinstance(default, bool) else ()))


def _trace(module: nn.Module, leaves: Collection[nn.Module], constants: dict[str, Any]) -> fx.Graph:
    """Trace a copy that shares the parameters: code that keeps what it computes would keep stand-ins.

    A node that it keeps on a module, where others may read it, has `meta["stored"]`. Running the code changes
    neither buffers nor the state of the random numbers.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    memo |= {id(buffer): buffer.detach().clone() for buffer in module.buffers()}
    copied = copy.deepcopy(module, memo)
    tracer = _Tracer({memo[id(leaf)] for leaf in leaves if id(leaf) in memo}, constants)
    try:
        with _TRACING, same_chance(), _unpatched():
            graph = tracer.trace(copied)
    finally:  # torch.fx leaves the tracer in a cycle, and this copy has the network's own parameters
        tracer.root, tracer.leaves, tracer.tensor_attrs = nn.Module(), (), {}
    for own in map(vars, copied.modules()):
        for stored in pytree.tree_leaves({key: own[key] for key in own if key not in _OF_MODULES}):
            if isinstance(stored, fx.Proxy):
                stored.node.meta["stored"] = True
    return graph


@contextmanager
def _unpatched() -> Iterator[None]:
    """Give back what torch.fx patches for all, which it does not where an interrupt meets it as it ends."""
    methods = nn.Module.__call__, nn.Module.__getattr__
    names = [(vars(one), dict(vars(one))) for one in (math, _symbolic_trace)]
    try:
        yield
    finally:
        nn.Module.__call__, nn.Module.__getattr__ = methods
        for now, before in names:
            now.update(before)


def _branches_unseen(module: nn.Module) -> bool:
    """Whether a forward asks what a stand-in answers in one way only."""
    code = getattr(type(module).forward, "__code__", None)
    if code is None or _ASKS & {*code.co_names}:
        return True
    before: tuple[str, Any] | None = None
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IS_OP" and before != ("LOAD_CONST", None):
            return True
        before = instruction.opname, instruction.argval
    return False


def _uses_collected(graph: fx.Graph) -> bool:
    """Whether code uses what it collects in `*args` or `**kwargs`."""
    return any(node.op == "placeholder" and str(node.target)[0] == "*" and node.users for node in graph.nodes)
