"""What a file of your own may hold: token mixers, channel mixers, routers, architectures.

    pretrain_smlp.py --plugin gated_conv.py --architecture gated_conv ...

The file needs this module and torch alone. A class says what it computes between two projections;
flags, tensor parallelism, checkpoints, costs, metrics, export and generation follow from it, and
`smlp-check FILE` shows that they do. docs/own-mixer.md is the tutorial.

An exported model holds a copy of this file beside the plugin's, and runs the same classes.

Letters: B batch, T sequence length, D hidden, F features of a mixer, N tokens, E experts, k choices
of a token, C chunks of features, P prefix length.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

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

Init = Callable[[Tensor], Any]
"""Draws the first values of a parameter in place: <fp32>, on the CPU."""


State = dict[str, Tensor] | None
"""What a token mixer keeps between two calls of a generation; see TokenMixer."""


def zeros(values: Tensor) -> None:
    """Start at 0."""
    values.zero_()


def ones(values: Tensor) -> None:
    """Start at 1."""
    values.fill_(1.0)


def normal(std: float) -> Init:
    """Start at normal values around 0 with this standard deviation."""
    return lambda values: values.normal_(std=std)


small = normal(0.02)
"""Small normal values, as --init-method-std draws them by default."""


def uniform(bound: float) -> Init:
    """Start at values between -bound and bound."""
    return lambda values: values.uniform_(-bound, bound)


@dataclass(frozen=True, kw_only=True)
class Option:
    """A flag of a plugin: `taps: int = option(4, "tokens that a position reads", smallest=1)`.

    Its name, with hyphens, is the flag; its annotation says the type: int, float, bool, str, or a
    Literal of strings.
    """

    default: Any
    help: str
    """What it means, with its unit."""
    smallest: float | None = None
    may_change: bool = False
    """Whether a run that goes on from a checkpoint may have another value."""
    kind: type = str
    choices: tuple[str, ...] | None = None


def option(
    default: Any, help: str, *, smallest: float | None = None, may_change: bool = False
) -> Any:
    """Declare a flag, as the value of an annotated name in a class; see Option."""
    return Option(default=default, help=help, smallest=smallest, may_change=may_change)


def options_of(kind: type) -> dict[str, Option]:
    """Return the options that a class and its bases declare, by name.

    Raises:
        TypeError: one has an annotation of no flag.
    """
    declared: dict[str, Option] = {}
    for base in reversed(kind.__mro__):
        options = {name: it for name, it in vars(base).items() if isinstance(it, Option)}
        hints = get_type_hints(base) if options else {}
        for name, it in options.items():
            hint = hints.get(name)
            choices = get_args(hint) if get_origin(hint) is Literal else None
            type_ = str if choices else hint
            if type_ not in (int, float, bool, str):
                raise TypeError(
                    f"{kind.__name__}.{name} is an option: annotate it as int, float, "
                    f"bool, str or a Literal of strings, not as {hint}."
                )
            declared[name] = dataclasses.replace(it, kind=type_, choices=choices)
    return declared


def values_in(kind: type, source: Any) -> dict[str, Any]:
    """Return the values of a class's options, which are attributes of a namespace or config."""
    return {name: getattr(source, name) for name in options_of(kind)}


def _set_options(module: Any, values: Mapping[str, Any], **sizes: int) -> None:
    """Put the values of its options, or their defaults, in the place of the records."""
    module.made_of = {**sizes, "values": values}
    for name, it in options_of(type(module)).items():
        setattr(module, name, values.get(name, it.default))


@torch.no_grad()
def compute_tables(model: nn.Module) -> None:
    """Compute the buffers of plugins' classes that are not saved (persistent=False): a model that
    was built without values, as from_pretrained builds it, has none in them."""
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
    """A parameter of a plugin, read by a call.

    The host hooks the call: gathers are waited for there, and a parameter that all ranks of a
    tensor parallel group hold whole has its gradient summed over them.
    """

    def __init__(self, *shape: int, cut: int | None, init: Init) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.cut, self.init = cut, init
        self.read: Callable[[Tensor], Tensor] | None = None

    @torch.no_grad()
    def draw(self, *, parts: int = 1, part: int = 0) -> None:
        """Draw the first values: all ranks draw the whole, and each keeps its part."""
        shape = list(self.weight.shape)
        if self.cut is not None:
            shape[self.cut] *= parts
        whole = torch.empty(shape)
        self.init(whole)
        kept = whole if self.cut is None else whole.chunk(parts, dim=self.cut)[part]
        self.weight.copy_(kept)

    def forward(self) -> Tensor:
        return self.weight if self.read is None else self.read(self.weight)


def weights_of(module: nn.Module) -> list[Weight]:
    """Return the parameters of a plugin's module."""
    return [part for part in module.modules() if isinstance(part, Weight)]


class _WithWeights(nn.Module):
    """What holds parameters of a plugin."""

    def draw(self) -> Self:
        """Draw the first values of all parameters, where no host does."""
        for weight in weights_of(self):
            weight.draw()
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Weight) and (hasattr(type(self), name) or name in self.__dict__):
            raise AttributeError(
                f"{type(self).__name__}.{name} is a parameter, and a name that its base class has: "
                "give it another."
            )
        super().__setattr__(name, value)


def masked_product(weight: Tensor, values: Tensor) -> Tensor:
    """Mixer.causal_product, where no host has a faster one."""
    return weight.tril() @ values


class Mixer(_WithWeights):
    """What token mixers and channel mixers share: they stand between two projections of the host.

    Args:
        width: features of this rank, F / TP, or F where the mixer is `whole`.
        length: T, tokens.
        values: of its options.
    """

    inner: ClassVar[Mapping[str, int]] = {"value": 1}
    """The projections of the layer's normed input: name -> outputs per feature. `forward` is given
    them in this order; the projection from F features back to D is the host's."""
    whole: ClassVar[bool] = False
    """Whether it needs all F features of a token at once, as a norm over them does. The host then
    gathers them over the tensor parallel group, and all ranks compute the same."""
    causal_product: Callable[[Tensor, Tensor], Tensor] = staticmethod(masked_product)
    """(weight <float>[T', T'], values <float>[B, T', N]) -> the lower triangle of weight times
    values, <float>[B, T', N]. Megatron's host computes the triangle alone, and FLOPs are counted
    so."""

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
        """Make the parameters, by `self.parameter`."""

    def parameter(self, *shape: int, cut: int | None, init: Init) -> Weight:
        """Make a parameter, which `forward` reads by a call.

        Args:
            shape: on this rank.
            cut: the axis that is split as the features are; None: every rank has all of it.
            init: draws its first values, as zeros, ones, normal(std) or uniform(bound).
        """
        return Weight(*shape, cut=cut, init=init)

    def forward(self, *inner: Tensor) -> Tensor:
        """Each of `inner`: <float>[B, T', width], or [B, T', width, outputs] where it has several a
        feature -> <float>[B, T', width]; T' <= T."""
        raise NotImplementedError

    @classmethod
    def cost(
        cls, *, features: int, length: int, values: Mapping[str, Any]
    ) -> tuple[int, int] | None:
        """Return forward FLOPs of one sequence between the projections: those that are needed, and
        those with full squares in place of triangles. None: torch counts the products, and both are
        that number."""
        return None


def projections_of(kind: type[Mixer]) -> dict[str, int]:
    """Return what a host calls each of `inner`, and its outputs per feature."""
    return {f"inner_{name}": outputs for name, outputs in kind.inner.items()}


def mix(mixer: Mixer, projected: Sequence[Tensor], **state: dict[str, Tensor]) -> Tensor:
    """Run a mixer on what a host's projections give, <float>[B, T', outputs * width] each."""
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
    takes a state. In generation that is a dict of tensors whose axis 0 is B, empty before the first
    token: `forward` is given the tokens behind those that it knows, and leaves what the next call
    needs. In training it is None.
    """

    learned_positions: ClassVar[bool] = True
    """Whether the model's input has learned positions; else they are the mixer's affair."""


def keeps_state(kind: type[Mixer]) -> bool:
    """Whether its `forward` takes a state."""
    return "state" in inspect.signature(kind.forward).parameters


class ChannelMixer(Mixer):
    """Works on each token by itself, in the place of the FFN."""


class TokenRouter(nn.Module):
    """A rule by which N tokens choose among E experts of FFNs.

    The scores are h W in fp32, W: <float>[E, D] the host's, unless `scores` says otherwise.
    `choose` is called without gradient for the whole micro-batch, `weigh` with it.
    """

    experts_per_token: ClassVar[int] = 1
    """k, experts that a token visits, by which FLOPs are counted and tokens are sent. With
    `may_skip` their number on average, at most."""
    may_skip: ClassVar[bool] = False
    """Whether `choose` says which of the choices are visited, so that tokens have fewer or more."""

    def __init__(self, *, num_experts: int, values: Mapping[str, Any]) -> None:
        super().__init__()
        self.num_experts = num_experts
        _set_options(self, values, num_experts=num_experts)

    def scores(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """hidden: <float>[..., D], weight: <float>[E, D] -> scores <fp32>[..., E], with gradient.

        Default: their products.
        """
        return functional.linear(hidden.float(), weight.float())

    def choose(self, scores: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """scores: <fp32>[N, E] -> experts <int64>[N, k], distinct in a row; or these and which of
        them are visited, <bool>[N, k]. In evaluation no row may depend on another.

        Default: the k highest scores.
        """
        return scores.topk(self.experts_per_token, dim=-1).indices

    def choices(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `choose` says, with the choices that are visited where it says none: all."""
        chosen = self.choose(scores)
        if isinstance(chosen, tuple):
            return chosen
        return chosen, torch.ones_like(chosen, dtype=torch.bool)

    def weigh(self, scores: Tensor, chosen: Tensor) -> Tensor:
        """scores: <fp32>[n, E]; chosen: <int64>[n, k] -> weights <fp32>[n, k], with gradient.

        Default: the softmax over all experts, of the chosen ones.
        """
        return scores.softmax(dim=-1).gather(1, chosen)

    def loss(self, scores: Tensor, chosen: Tensor) -> Tensor | None:
        """scores: <fp32>[N, E], chosen: <int64>[N, k] -> a loss that is added with
        --moe-aux-loss-coeff, or None."""
        return None

    def update(self, loads: Tensor) -> None:
        """After a step that was not skipped: change buffers.

        Buffers are fp32, saved with the model and exported unless they are registered as not
        persistent. What `choose` added to them in a step is averaged over data parallel ranks
        before.

        Args:
            loads: <fp32>[E], tokens of all ranks that visited each expert in the step.
        """

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> TokenRouter:
        """Keep buffers in fp32 where a model is cast, buffers and all, to half precision."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and buffer.is_floating_point():
                self._buffers[name] = moved.float() if buffer.is_meta else buffer.to(moved.device)
        return self


class FeatureRouter(_WithWeights):
    """A rule by which the C chunks of a sample's features choose among E spatial experts (smlp), by
    its first P tokens: tokens before P are routed as chunk i to expert i mod E.

    Each chunk is routed by itself: a tensor parallel rank sees C' of them.
    """

    def __init__(self, *, num_experts: int, prefix_length: int, values: Mapping[str, Any]) -> None:
        super().__init__()
        self.num_experts, self.prefix_length = num_experts, prefix_length
        _set_options(self, values, num_experts=num_experts, prefix_length=prefix_length)
        self.build(prefix_length, num_experts)

    def build(self, prefix_length: int, num_experts: int) -> None:
        """Make the parameters, by `self.parameter`."""

    def parameter(self, *shape: int, init: Init) -> Weight:
        """Make a parameter, which `scores` reads by a call; every rank has all of it."""
        return Weight(*shape, cut=None, init=init)

    def scores(self, means: Tensor) -> Tensor:
        """means: <fp32>[B, P, C'], of each chunk over its features before their norm -> scores
        <fp32>[B, C', E], with gradient. The balance loss (--feature-aux-loss-coeff) is of their
        softmax."""
        raise NotImplementedError

    def choose(self, scores: Tensor) -> Tensor:
        """scores: <fp32>[B, C', E] -> experts <int64>[B, C']. Default: the highest score."""
        return scores.argmax(dim=-1)

    def weigh(self, scores: Tensor, experts: Tensor) -> Tensor:
        """Return what the experts' mixed values are multiplied by, <fp32>[B, C'], with gradient.

        Default: E times the softmax of the chosen one, 1 where all scores are equal.
        """
        chosen = scores.softmax(dim=-1).gather(-1, experts[..., None])[..., 0]
        return self.num_experts * chosen


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The fillings of a model's layers."""

    layers: Callable[[int, int], tuple[str, str]]
    """(number from 0, number of layers) -> (token mixer, channel mixer), names of registered ones
    or of ours (megatron_smlp/systems.py), the channel mixer also `mlp` or `none`. In MoE layers
    token experts stand in its place, whatever it is."""


@dataclass
class Registry:
    """All that the plugins of this process have registered, by name."""

    token_mixers: dict[str, type[TokenMixer]] = field(default_factory=dict)
    channel_mixers: dict[str, type[ChannelMixer]] = field(default_factory=dict)
    token_routers: dict[str, type[TokenRouter]] = field(default_factory=dict)
    feature_routers: dict[str, type[FeatureRouter]] = field(default_factory=dict)
    architectures: dict[str, Architecture] = field(default_factory=dict)
    listeners: list[Callable[[], Any]] = field(default_factory=list)
    updates: list[Callable[..., None]] = field(default_factory=list)
    schedules: list[Callable[[float], float]] = field(default_factory=list)

    def tables(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Return each table with what its entries are called."""
        yield "token mixer", self.token_mixers
        yield "channel mixer", self.channel_mixers
        yield "token router", self.token_routers
        yield "feature router", self.feature_routers
        yield "architecture", self.architectures

    def __call__[Kind: type](self, name: str) -> Callable[[Kind], Kind]:
        """Register a class: `@register("name")`.

        Raises:
            TypeError: it is none of the bases'.
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
                    f"register({name!r}): {kind.__name__} is no TokenMixer, ChannelMixer, "
                    "TokenRouter or FeatureRouter: derive it from one."
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
        """Register an architecture: one mixer and channel in all layers, or `layers` by number.

        Raises:
            ValueError: the name is taken, or neither or both of `mixer` and `layers` are given.
        """
        if (mixer is None) == (layers is None):
            raise ValueError(
                f"register.architecture({name!r}): give mixer= or layers=, one of them."
            )
        pair = (str(mixer), channel)
        self._add(self.architectures, name, Architecture(layers=layers or (lambda _, __: pair)))

    def listener[Kind: type](self, kind: Kind) -> Kind:
        """Register a class that looks on: `@register.listener` on a training.events.Listener. Each
        training makes one, behind those of the program. No model is exported with its file."""
        self.listeners.append(kind)
        return kind

    def update[Function: Callable[..., None]](self, function: Function) -> Function:
        """Register a function that changes buffers once a step, behind the optimizer's update:
        `f(models, skipped=bool)`, on every rank; see training.events.Update. In bf16 and fp16 a
        weight has to be changed in `parameter.main_param` too, from which the next step makes it.
        """
        self.updates.append(function)
        return function

    def schedule[Function: Callable[[float], float]](self, function: Function) -> Function:
        """Register a factor of the learning rate: `f(done)`, with done from 0 in the first step to
        1 at --lr-decay-iters. It multiplies what --lr-decay-style and the warm-up say: with
        `constant` it is the schedule."""
        self.schedules.append(function)
        return function

    def _add(self, table: dict[str, Any], name: str, value: Any) -> None:
        if not name.isidentifier():
            raise ValueError(f"register: {name!r} is no name: use letters, digits and underscores.")
        if name in table:
            raise ValueError(f"register: two plugins have the name {name!r}: rename one of them.")
        table[name] = value


register = Registry()
