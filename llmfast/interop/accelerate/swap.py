"""Changing what one module instance computes with, and changing it back.

A swapped module gets a subclass of its own class, with another ``forward`` and nothing else: parameters, buffers,
hooks, names and ``isinstance`` stay. The subclass carries the original's name, so that code which asks for class names
(saving, FSDP policies, Hugging Face) sees what it knows; copies and pickles are made of (original class, swap).
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llmfast import ops
from llmfast.ops import _library

# Instance attribute of a swapped module: the fallbacks that the model has told of; one set for the whole model.
TOLD = "_llmfast_told"
SWAPS: dict[str, type[Swap]] = {}


class Decline(Exception):
    """Why a module stays as it is."""


class Swap:
    """A kind of module and the faster way through it. Subclasses register themselves under ``name``."""

    name: ClassVar[str]
    flag: ClassVar[str]  # the argument of accelerate() that switches it
    owns_children: ClassVar[bool] = False  # whether the parameters below are taken care of as well
    residual: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        SWAPS[cls.name] = cls

    @classmethod
    def candidate(cls, module: nn.Module) -> bool:
        """Whether the module's type looks like it."""
        raise NotImplementedError

    @classmethod
    def check(cls, module: nn.Module) -> None:
        """Raises ``Decline`` where its structure is not the known one."""

    @classmethod
    def example(cls, module: nn.Module) -> Any:
        """An input that tells whether both ways compute the same; None where the type alone is proof."""
        return None

    @classmethod
    def run(cls, module: nn.Module, original: type[nn.Module], args: Any, kwargs: Any) -> Any:
        """What ``module.forward(*args, **kwargs)`` is from now on."""
        raise NotImplementedError

    @classmethod
    def note(cls, module: nn.Module) -> str:
        """What the user should know about it."""
        return ""


@functools.cache
def swapped_class(original: Any, name: str) -> Any:
    """The subclass of a module class that computes by swap ``name``."""
    swap = SWAPS[name]

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return swap.run(self, original, args, kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        made_of = original.__reduce_ex__(self, protocol)  # (copyreg.__newobj__, (class, ...), state, ...)
        if isinstance(made_of, str) or made_of[1][:1] != (type(self),):
            return made_of
        return _new, (original, name, *made_of[1][1:]), *made_of[2:]

    body = {"forward": forward, "__reduce_ex__": reduce, "_llmfast_swap": name, "_llmfast_original": original}
    body |= {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original)(original.__name__, (original,), body)


def _new(original: Any, name: str, *arguments: Any) -> nn.Module:
    cls = swapped_class(original, name)
    return cls.__new__(cls, *arguments)


def swap_of(module: nn.Module) -> str | None:
    """The name of its swap, or None."""
    return getattr(type(module), "_llmfast_swap", None)


def original_class(module: nn.Module) -> type[nn.Module]:
    return getattr(type(module), "_llmfast_original", type(module))


def put_in(module: nn.Module, name: str, told: set[str]) -> None:
    kind: Any = type(module)
    module.__class__ = swapped_class(kind, name)
    module.__dict__[TOLD] = told


def take_out(module: nn.Module) -> None:
    module.__class__ = original_class(module)
    module.__dict__.pop(TOLD, None)


def fall_back(module: nn.Module, original: type[nn.Module], args: Any, kwargs: Any, reason: str) -> Any:
    """The original forward, told of once a model and reason."""
    told = module.__dict__.get(TOLD)
    if told is not None and not torch.compiler.is_compiling() and reason not in told:
        told.add(reason)
        warnings.warn(
            f"llmfast: {original.__name__} takes its original forward: {reason} (said once)", RuntimeWarning, 2
        )
    return original.forward(module, *args, **kwargs)


# ---- Proof -----------------------------------------------------------------------------------------------------------


def disagreement(module: nn.Module, swap: type[Swap], seen: dict[Any, str | None]) -> str | None:
    """Why the swap does not compute what the module's own forward does, on random parameters; None where it does.

    ``seen`` holds the answers for modules alike (class and shapes), so that a model of many layers pays once.
    """
    example = swap.example(module)
    if example is None:
        return None
    shapes = tuple((name, p.shape) for name, p in module.named_parameters())
    key = (swap.name, type(module), shapes, repr(module))
    if key not in seen:
        seen[key] = _disagreement(module, swap, example)
    return seen[key]


def _disagreement(module: nn.Module, swap: type[Swap], example: tuple[Any, ...]) -> str | None:
    generator = torch.Generator().manual_seed(0)
    try:
        copy = _twin(module, generator, {})
    except NotImplementedError:  # buffers on the meta device
        return "it is on the meta device; load its weights first"
    backend = "cpp" if _library.why_not_loaded() is None else "torch"
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        try:
            wanted = _first(type(copy).forward(copy, *example))
        except Exception as raised:  # whatever a stranger's code raises: it is not the known forward
            return f"its own forward failed on random numbers ({type(raised).__name__}: {raised})"
        kind: Any = type(copy)
        copy.__class__ = swapped_class(kind, swap.name)
        with ops.use_backend(backend):
            found = _first(copy(*example))
    if not isinstance(wanted, Tensor) or wanted.shape != found.shape:
        return "its forward returns something else than the known one"
    if swap.residual:
        wanted, found = wanted - example[0], found - example[0]
    error = float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))
    if not error < 1e-4:
        return f"its forward computes something else than the known one (off by {error:.0e} on random numbers)"
    return None


def _first(output: Any) -> Any:
    """The tensor of an output that may be a tuple with more, of which a loss comes second."""
    if not isinstance(output, tuple):
        return output
    return next((t for t in reversed(output) if isinstance(t, Tensor) and t.dim() == 0), output[0])


def _twin(module: nn.Module, generator: torch.Generator, made: dict[int, Any]) -> Any:
    """The tree of modules in evaluation mode, without hooks and swaps, with random float32 parameters on the CPU.

    Shares nothing with the module but its plain attributes.
    """
    cls = original_class(module)
    copy = cls.__new__(cls)
    copy.__dict__.update(nn.Module().__dict__)
    own = {name: value for name, value in module.__dict__.items() if name not in copy.__dict__}
    copy.__dict__.update(own, training=False)
    for name, p in module._parameters.items():
        if p is not None and id(p) not in made:
            # Matrices keep the size of what they multiply; vectors, weights of norms among them, lie around 1.
            values = torch.randn(p.shape, generator=generator)
            values = values * (p.numel() / max(p.shape)) ** -0.5 if p.dim() > 1 else 1 + 0.3 * values
            made[id(p)] = nn.Parameter(values, requires_grad=False)
        copy._parameters[name] = None if p is None else made[id(p)]
    for name, buffer in module._buffers.items():
        copy._buffers[name] = None if buffer is None else buffer.detach().cpu()
    for name, child in module._modules.items():
        copy._modules[name] = None if child is None else _twin(child, generator, made)
    return copy
