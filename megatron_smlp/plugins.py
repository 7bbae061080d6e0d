"""What a plugin file may define: token mixers, channel mixers, routers, architectures.

    pretrain_smlp.py --plugin gated_conv.py --architecture gated_conv ...

The file needs only this module and torch. A class defines what it computes between two projections;
flags, tensor parallelism, checkpoints, costs, metrics, export and generation follow from that, and
`smlp-check FILE` shows that they do. docs/own-mixer.md is the tutorial.

An exported model contains a copy of this file next to the plugin's, and runs the same classes.

Letters: B batch, T sequence length, D hidden, F features of a mixer, N tokens, E experts, k choices
of a token, C chunks of features, P prefix length.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "Architecture",
    "ChannelMixer",
    "FeatureRouter",
    "Mixer",
    "Option",
    "State",
    "TokenMixer",
    "TokenRouter",
    "Weight",
    "normal",
    "ones",
    "option",
    "register",
    "small",
    "uniform",
    "zeros",
]

Kind = TypeVar("Kind", bound=type)
Update = TypeVar("Update", bound=Callable[..., None])
Schedule = TypeVar("Schedule", bound=Callable[[float], float])
Init = Callable[[Tensor], Any]
"""Draws the initial values of a parameter in place: <fp32>, on the CPU."""


TOPK = 2
"""Megatron's default of --moe-router-topk."""

State = dict[str, Tensor] | None
"""What a token mixer keeps between two calls during generation; see TokenMixer."""


def zeros(values: Tensor) -> None:
    """Start at 0."""
    values.zero_()


def ones(values: Tensor) -> None:
    """Start at 1."""
    values.fill_(1.0)


def normal(std: float) -> Init:
    """Start at normal values with mean 0 and this standard deviation."""
    return lambda values: values.normal_(std=std)


small = normal(0.02)
"""Small normal values, with the default standard deviation of --init-method-std."""


def uniform(bound: float) -> Init:
    """Start at values between -bound and bound."""
    return lambda values: values.uniform_(-bound, bound)


@dataclass(frozen=True, kw_only=True)
class Option:
    """A flag of a plugin: `taps: int = option(4, "tokens that a position reads", smallest=1)`.

    Its name, with hyphens, is the flag; its annotation is the type: int, float, bool, str, or a
    Literal of strings.
    """

    default: Any
    help: str
    """Its meaning, with the unit."""
    smallest: float | None = None
    may_change: bool = False
    """Whether a run that resumes from a checkpoint may use another value."""
    kind: type = str
    choices: tuple[str, ...] | None = None


def option(
    default: Any, help: str, *, smallest: float | None = None, may_change: bool = False
) -> Any:
    """Declare a flag, as the default of an annotated class attribute; see Option."""
    return Option(default=default, help=help, smallest=smallest, may_change=may_change)


def options_of(kind: type) -> dict[str, Option]:
    """Return the options that a class and its bases declare, by name.

    Raises:
        TypeError: one has an annotation that no flag can have, or the name of a base's member.
    """
    declared: dict[str, Option] = {}
    hosts = [base for base in kind.__mro__ if base.__module__ == __name__ or base is nn.Module]
    for base in reversed(kind.__mro__):
        options = {name: it for name, it in vars(base).items() if isinstance(it, Option)}
        hints = get_type_hints(base) if options else {}
        for name, it in options.items():
            if any(name in vars(host) for host in hosts):
                raise TypeError(
                    f"{kind.__name__}.{name} is an option, but its base class has that name: "
                    "rename it."
                )
            hint = hints.get(name)
            choices = get_args(hint) if get_origin(hint) is Literal else None
            type_ = str if choices and all(isinstance(it, str) for it in choices) else hint
            if type_ not in (int, float, bool, str):
                raise TypeError(
                    f"{kind.__name__}.{name} is an option: annotate it as int, float, "
                    f"bool, str or a Literal of strings, not as {hint}."
                )
            declared[name] = dataclasses.replace(it, kind=type_, choices=choices)
    return declared


def values_in(kind: type, source: Any) -> dict[str, Any]:
    """Return the values of a class's options, read from the attributes of a namespace or config."""
    return {name: getattr(source, name) for name in options_of(kind)}


def _set_options(module: Any, values: Mapping[str, Any], **sizes: int) -> None:
    """Set a module's option attributes to their values or defaults, in place of the records."""
    module.made_of = {**sizes, "values": values}
    for name, it in options_of(type(module)).items():
        setattr(module, name, values.get(name, it.default))


@torch.no_grad()
def compute_tables(model: nn.Module) -> None:
    """Compute plugin buffers that are not saved (persistent=False), which are empty in a model that
    was built without values, as by from_pretrained."""
    for own in model.modules():
        if isinstance(own, Mixer | TokenRouter | FeatureRouter) and _tables_of(own):
            made = _tables_of(type(own)(**own.made_of))
            for (part, name, before), (_, _, value) in zip(_tables_of(own), made, strict=True):
                device = "cpu" if before.is_meta else before.device
                dtype = value.dtype if isinstance(own, TokenRouter) else before.dtype
                part._buffers[name] = value.to(device, dtype)


def _tables_of(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    return [
        (part, name, buffer)
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if name in part._non_persistent_buffers_set and buffer is not None
    ]


class Weight(nn.Module):
    """A plugin's parameter, read by calling it.

    The host hooks into the call: it waits for all-gathers there, and sums the gradient of a
    parameter that is replicated in a tensor parallel group over the group's ranks.
    """

    def __init__(self, *shape: int, cut: int | None, init: Init) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.cut, self.init = cut, init
        self.read: Callable[[Tensor], Tensor] | None = None

    @torch.no_grad()
    def draw(self, *, parts: int = 1, part: int = 0) -> None:
        """Draw the initial values: every rank draws the whole parameter and keeps its part.

        Raises:
            ValueError: `init` left some out.
        """
        shape = list(self.weight.shape)
        if self.cut is not None:
            shape[self.cut] *= parts
        whole = torch.full(shape, torch.nan)
        self.init(whole)
        if whole.isnan().any():
            raise ValueError(
                f"the init of a parameter {shape} leaves values unset: it must change the tensor "
                "that it is given, as values.normal_() does; what it returns is not read."
            )
        kept = whole if self.cut is None else whole.chunk(parts, dim=self.cut)[part]
        self.weight.copy_(kept)

    def forward(self) -> Tensor:
        return self.weight if self.read is None else self.read(self.weight)


def weights_of(module: nn.Module) -> list[Weight]:
    """Return all parameters of a plugin's module."""
    return [part for part in module.modules() if isinstance(part, Weight)]


class _WithWeights(nn.Module):
    """Base class of what holds a plugin's parameters."""

    def draw(self) -> Self:
        """Draw the initial values of all parameters, if there is no host to do it."""
        for weight in weights_of(self):
            weight.draw()
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Weight) and (hasattr(type(self), name) or name in self.__dict__):
            raise AttributeError(
                f"{type(self).__name__}.{name} is a parameter, but its base class has that name: "
                "rename it."
            )
        if isinstance(value, nn.Parameter | nn.Module) and _has_strays(value):
            raise TypeError(
                f"{type(self).__name__}.{name} has a parameter of torch's: make it with "
                "self.parameter, which initializes and shards it."
            )
        super().__setattr__(name, value)


def _has_strays(value: nn.Parameter | nn.Module) -> bool:
    """Return whether it is or has a parameter that is no Weight's."""
    if isinstance(value, nn.Parameter):
        return True
    known = {id(weight.weight) for weight in weights_of(value)}
    return any(id(parameter) not in known for parameter in value.parameters())


def masked_product(weight: Tensor, values: Tensor) -> Tensor:
    """Mixer.causal_product, unless a host has a faster one."""
    return weight.tril().to(values.dtype) @ values


class Mixer(_WithWeights):
    """Base class of token mixers and channel mixers, which sit between two projections of the host.

    Args:
        width: features of this rank: F / TP, or F if the mixer is `whole`.
        length: T, tokens.
        values: values of its options.
    """

    inner: ClassVar[Mapping[str, int]] = {"value": 1}
    """The projections of the layer's normed input: name -> outputs per feature. `forward` gets them
    in this order; the host also projects from F features back to D."""
    whole: ClassVar[bool] = False
    """Whether it needs all F features of a token at once, as a norm over them does. The host then
    gathers them over the tensor parallel group, and all ranks compute the same."""
    causal_product: Callable[[Tensor, Tensor], Tensor] = staticmethod(masked_product)
    """(weight <float>[T', T'], values <float>[B, T', N]) -> the lower triangle of weight times
    values, <float>[B, T', N]. Megatron's host computes only the triangle, and FLOPs are counted
    accordingly."""

    def __init__(self, *, width: int, length: int, values: Mapping[str, Any]) -> None:
        super().__init__()
        self.width, self.length = width, length
        _set_options(self, values, width=width, length=length)
        self.build(width, length)

    @classmethod
    def features(cls, *, hidden_size: int, ffn_hidden_size: int, values: Mapping[str, Any]) -> int:
        """Return F; default: D."""
        return hidden_size

    def build(self, width: int, length: int) -> None:
        """Create the parameters with `self.parameter`."""

    def parameter(self, *shape: int, cut: int | None, init: Init) -> Weight:
        """Create a parameter, which `forward` reads by calling it.

        Args:
            shape: its shape on this rank.
            cut: the axis that is sharded like the features; None: every rank holds all of it.
            init: draws its initial values: zeros, ones, normal(std), uniform(bound) or the like.
        """
        return Weight(*shape, cut=cut, init=init)

    def forward(self, *inner: Tensor) -> Tensor:
        """Each of `inner`: <float>[B, T', width], or [B, T', width, outputs] if it has several per
        feature -> <float>[B, T', width]; T' <= T."""
        raise NotImplementedError

    @classmethod
    def cost(
        cls, *, features: int, length: int, values: Mapping[str, Any]
    ) -> tuple[int, int] | None:
        """Return the forward FLOPs of one sequence between the projections: those needed, and those
        with full squares in place of triangles. None: torch counts the products, `causal_product`
        either way."""
        return None


def projections_of(kind: type[Mixer]) -> dict[str, int]:
    """Return the host's name for each of `inner`, and its outputs per feature."""
    return {f"inner_{name}": outputs for name, outputs in kind.inner.items()}


def mix(mixer: Mixer, projected: Sequence[Tensor], **state: dict[str, Tensor]) -> Tensor:
    """Run a mixer on the host's projected inputs, <float>[B, T', outputs * width] each."""
    counts = mixer.inner.values()
    parts = (
        part if outputs == 1 else part.unflatten(-1, (-1, outputs))
        for part, outputs in zip(projected, counts, strict=True)
    )
    mixed: Tensor = mixer(*parts, **state)
    return mixed


class TokenMixer(Mixer):
    """Mixes tokens, causally: output t reads inputs 0..t.

    Generation mixes all tokens so far again at each step, unless `forward(*inner, state=None)`
    takes a state. During generation that is a dict of tensors whose axis 0 is B, empty before the
    first token: `forward` gets only the tokens after those it has seen, and stores in the dict what
    the next call needs. In training it is None.
    """

    learned_positions: ClassVar[bool] = True
    """Whether the model's input has learned positions; if not, positions are up to the mixer."""


def keeps_state(kind: type[Mixer]) -> bool:
    """Return whether a mixer's `forward` takes a state."""
    return "state" in inspect.signature(kind.forward).parameters


class ChannelMixer(Mixer):
    """Works on each token by itself, in place of the FFN."""


class _Router(_WithWeights):
    """Base class of a rule of routing, whose parameters every rank holds whole."""

    def parameter(self, *shape: int, init: Init) -> Weight:
        """Create a parameter, read by calling it; every rank holds all of it."""
        return Weight(*shape, cut=None, init=init)


class TokenRouter(_Router):
    """A rule by which N tokens choose among E FFN experts.

    The scores are h W in fp32, with the host's W: <float>[E, D], unless `scores` is overridden.
    Parameters besides W are made with `self.parameter` in `__init__`.
    `choose` is called without gradients for the whole micro-batch, `weigh` with them.
    """

    experts_per_token: int | None = 1
    """k, the number of experts that a token visits, for counting FLOPs and sending tokens. With
    `may_skip`, an upper bound on their average number. None: that of --moe-router-topk, 2 by
    default, which an object then has here."""
    may_skip: ClassVar[bool] = False
    """Whether `choose` also says which choices are visited, so that tokens have fewer or more."""

    def __init__(self, *, num_experts: int, values: Mapping[str, Any]) -> None:
        super().__init__()
        self.num_experts = num_experts
        _set_options(self, values, num_experts=num_experts)
        if self.experts_per_token is None:
            self.experts_per_token = values.get("moe_router_topk", TOPK)

    def scores(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """hidden: <float>[..., D], weight: <float>[E, D] -> scores <fp32>[..., E], with gradient.

        Default: their dot products.
        """
        return functional.linear(hidden.float(), weight.float())

    def choose(self, scores: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """scores: <fp32>[N, E] -> experts <int64>[N, k], distinct within a row; or these and which
        of them are visited, <bool>[N, k]. In evaluation no row may depend on another.

        Default: the k highest scores.
        """
        return scores.topk(self.experts_per_token or TOPK, dim=-1).indices

    def choices(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return `choose`'s experts and which are visited: all, unless `choose` says so itself."""
        chosen = self.choose(scores)
        if isinstance(chosen, tuple):
            return chosen
        return chosen, torch.ones_like(chosen, dtype=torch.bool)

    def weigh(self, scores: Tensor, chosen: Tensor) -> Tensor:
        """scores: <fp32>[n, E]; chosen: <int64>[n, k] -> weights <fp32>[n, k], with gradient.

        Default: the chosen experts' entries of the softmax over all experts.
        """
        return scores.softmax(dim=-1).gather(1, chosen)

    def loss(self, scores: Tensor, chosen: Tensor) -> Tensor | None:
        """scores: <fp32>[N, E], chosen: <int64>[N, k] -> a loss that is added with weight
        --moe-aux-loss-coeff, or None."""
        return None

    def update(self, loads: Tensor) -> None:
        """Update buffers after a step that was not skipped.

        Buffers are fp32, and are saved with the model and exported unless they are registered as
        not persistent. What `choose` added to them during the step is averaged over data parallel
        ranks before this call.

        Args:
            loads: <fp32>[E], tokens of all ranks that visited each expert in the step.
        """

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> TokenRouter:
        """Keep buffers in fp32 when a model is cast, buffers included, to half precision."""
        kept = [(part, dict(part._buffers)) for part in self.modules()]
        super()._apply(fn, recurse)
        for part, buffers in kept:
            for name, buffer in buffers.items():
                moved = part._buffers[name]
                if buffer is not None and moved is not None and buffer.is_floating_point():
                    value = moved.float() if buffer.is_meta else buffer.to(moved.device)
                    part._buffers[name] = value
        return self


class FeatureRouter(_Router):
    """A rule by which the C chunks of a sample's features choose among E spatial experts (smlp),
    based on its first P tokens; in those tokens themselves, chunk i goes to expert i mod E.

    Chunks are routed independently: a tensor parallel rank sees C' of them.
    """

    def __init__(self, *, num_experts: int, prefix_length: int, values: Mapping[str, Any]) -> None:
        super().__init__()
        self.num_experts, self.prefix_length = num_experts, prefix_length
        _set_options(self, values, num_experts=num_experts, prefix_length=prefix_length)
        self.build(prefix_length, num_experts)

    def build(self, prefix_length: int, num_experts: int) -> None:
        """Create the parameters with `self.parameter`."""

    def scores(self, means: Tensor) -> Tensor:
        """means: <fp32>[B, P, C'], of each chunk over its features before their norm -> scores
        <fp32>[B, C', E], with gradient. The balance loss (--feature-aux-loss-coeff) uses their
        softmax."""
        raise NotImplementedError

    def choose(self, scores: Tensor) -> Tensor:
        """scores: <fp32>[B, C', E] -> experts <int64>[B, C']. Default: the highest score."""
        return scores.argmax(dim=-1)

    def weigh(self, scores: Tensor, experts: Tensor) -> Tensor:
        """Return the factors of the experts' mixed values, <fp32>[B, C'], with gradient.

        Default: E times the softmax of the chosen expert, which is 1 if all scores are equal.
        """
        chosen = scores.softmax(dim=-1).gather(-1, experts[..., None])[..., 0]
        return self.num_experts * chosen


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What fills the slots of a model's layers."""

    layers: Callable[[int, int], tuple[str, str]]
    """(layer number from 0, number of layers) -> names of (token mixer, channel mixer), registered
    ones or ours (megatron_smlp/systems.py); the channel mixer may also be `mlp` or `none`. In MoE
    layers, token experts replace the channel mixer."""


@dataclass
class Registry:
    """Everything that this process's plugins registered, by name."""

    token_mixers: dict[str, type[TokenMixer]] = field(default_factory=dict)
    channel_mixers: dict[str, type[ChannelMixer]] = field(default_factory=dict)
    token_routers: dict[str, type[TokenRouter]] = field(default_factory=dict)
    feature_routers: dict[str, type[FeatureRouter]] = field(default_factory=dict)
    architectures: dict[str, Architecture] = field(default_factory=dict)
    listeners: list[Callable[[], Any]] = field(default_factory=list)
    updates: list[Callable[..., None]] = field(default_factory=list)
    schedules: list[Callable[[float], float]] = field(default_factory=list)

    def tables(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield each table, preceded by what its entries are called."""
        yield "token mixer", self.token_mixers
        yield "channel mixer", self.channel_mixers
        yield "token router", self.token_routers
        yield "feature router", self.feature_routers
        yield "architecture", self.architectures

    def __call__(self, name: str) -> Callable[[Kind], Kind]:
        """Register a class: `@register("name")`.

        Raises:
            TypeError: it is derived from none of the base classes.
            ValueError: the name is taken.
        """

        def registered(kind: Kind) -> Kind:
            if issubclass(kind, TokenMixer):
                self._add(self.token_mixers, name, kind)
            elif issubclass(kind, ChannelMixer):
                self._add(self.channel_mixers, name, kind)
            elif issubclass(kind, TokenRouter):
                self._add(self.token_routers, name, kind)
            elif issubclass(kind, FeatureRouter):
                self._add(self.feature_routers, name, kind)
            else:
                raise TypeError(
                    f"register({name!r}): {kind.__name__} is not a TokenMixer, ChannelMixer, "
                    "TokenRouter or FeatureRouter: derive from one."
                )
            options_of(kind)
            return kind

        return registered

    def architecture(
        self,
        name: str,
        *,
        mixer: str | None = None,
        channel: str = "mlp",
        layers: Callable[[int, int], tuple[str, str]] | None = None,
    ) -> None:
        """Register an architecture: the same mixers in all layers, or by layer number (`layers`).

        Raises:
            ValueError: the name is taken, or neither or both of `mixer` and `layers` are given.
        """
        if (mixer is None) == (layers is None):
            raise ValueError(f"register.architecture({name!r}): give either mixer= or layers=.")
        pair = (str(mixer), channel)
        self._add(self.architectures, name, Architecture(layers=layers or (lambda _, __: pair)))

    def listener(self, kind: Kind) -> Kind:
        """Register an observer class: `@register.listener` on a training.events.Listener. Each
        training makes one, called after the program's own. Models are exported without its file."""
        self.listeners.append(kind)
        return kind

    def update(self, function: Update) -> Update:
        """Register a function that changes buffers once per step, after the optimizer's update:
        `f(models, skipped=bool)`, on every rank; see training.events.Update. In bf16 and fp16,
        change a weight in `parameter.main_param` too, from which the next step recomputes it; a
        distributed optimizer has a flat part of it on some ranks, and None on the others.
        """
        self.updates.append(function)
        return function

    def schedule(self, function: Schedule) -> Schedule:
        """Register a factor of the learning rate: `f(done)`, where done goes from 0 in the first
        step to 1 at --lr-decay-iters. It multiplies the rate set by --lr-decay-style and warm-up:
        with `constant` it is the whole schedule."""
        self.schedules.append(function)
        return function

    def _add(self, table: dict[str, Any], name: str, value: Any) -> None:
        if not name.isidentifier():
            raise ValueError(f"register: invalid name {name!r}: use letters, digits, underscores.")
        if name in table:
            raise ValueError(f"register: two plugins are named {name!r}: rename one of them.")
        table[name] = value


register = Registry()
