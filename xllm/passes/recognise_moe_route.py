"""Recognise ``xllm.moe_route``, the router of a mixture of experts.

    %scores = aten.softmax(%logits, -1, torch.float32); %best = aten.topk(%scores, k)
    ->   %weights, %ids = xllm.moe_route(%logits, None, k, softmax)

also with sigmoid scores, a bias for the choice, groups of experts, and softmax behind the choice.
What is done to the weights then (normalised, scaled, cast) becomes arguments of the same op.

Level: captured -> captured. Numerics: same rounding (a router that wants its experts in no order
gets the best first: only the order of a float32 sum over k may differ).
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from xllm.graph import calls_of
from xllm.passes.core import ModelFacts, PassContext
from xllm.passes.rewrite import Match, Rewrite, apply

aten = torch.ops.aten
xllm = torch.ops.xllm
Pair = tuple[Tensor, Tensor]
Ints = list[int]

#: Architectures whose routers are among the rules; others keep theirs in aten ops if none matches.
KNOWN = frozenset({
    "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeForCausalLM", "GptOssForCausalLM",
    "MiMoV2FlashForCausalLM", "MiniMaxM2ForCausalLM", "MixtralForCausalLM", "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
})


def softmax(logits: Tensor, top_k: int, ordered: bool) -> Pair:
    scores = aten.softmax.int(logits, -1, torch.float32)
    best = aten.topk.default(scores, top_k, -1, True, ordered)
    return best[0], best[1]


def softmax_float32(logits: Tensor, top_k: int, ordered: bool) -> Pair:
    best = aten.topk.default(aten.softmax.int(logits, -1), top_k, -1, True, ordered)
    return best[0], best[1]


def softmax_after_top_k(logits: Tensor, top_k: int, ordered: bool, dtype: torch.dtype) -> Pair:
    best = aten.topk.default(logits, top_k, -1, True, ordered)
    return aten.softmax.int(best[0], 1, dtype), best[1]


def sigmoid(logits: Tensor, bias: Tensor, top_k: int, ordered: bool) -> Pair:
    scores = aten.sigmoid.default(logits)
    choice = aten.add.Tensor(scores, bias)
    ids = aten.topk.default(choice, top_k, -1, True, ordered)[1]
    return aten.gather.default(scores, 1, ids), ids


def _elsewhere(of_group: Tensor, best: int, ordered: bool, groups: Ints, flat: Ints
               ) -> Tensor:
    """True for the experts outside the best groups, as transformers finds them."""
    chosen = aten.topk.default(of_group, best, -1, True, ordered)[1]
    zeros = aten.zeros_like.default(of_group, pin_memory=False)
    mask = aten.unsqueeze.default(aten.scatter_.value(zeros, 1, chosen, 1), -1)
    mask = aten.reshape.default(aten.expand.default(mask, groups), flat)
    return aten.bitwise_not.default(aten.to.dtype(mask, torch.bool))


def sigmoid_in_groups(
    logits: Tensor, bias: Tensor, top_k: int, top_groups: int, ordered: bool, groups: Ints,
    flat: Ints,
) -> Pair:
    scores = aten.sigmoid.default(logits)
    choice = aten.add.Tensor(scores, bias)
    best_two = aten.topk.default(aten.view.default(choice, groups), 2, -1, True, True)[0]
    of_group = aten.sum.dim_IntList(best_two, [-1])
    elsewhere = _elsewhere(of_group, top_groups, ordered, groups, flat)
    choice = aten.masked_fill.Scalar(choice, elsewhere, float("-inf"))
    ids = aten.topk.default(choice, top_k, -1, True, ordered)[1]
    return aten.gather.default(scores, 1, ids), ids


def softmax_in_groups(
    logits: Tensor, top_k: int, top_groups: int, ordered: bool, groups: Ints, flat: Ints,
) -> Pair:
    scores = aten.softmax.int(logits, -1, torch.float32)
    of_group = aten.max.dim(aten.view.default(scores, groups), -1)[0]
    elsewhere = _elsewhere(of_group, top_groups, ordered, groups, flat)
    choice = aten.masked_fill.Scalar(scores, elsewhere, 0.0)
    best = aten.topk.default(choice, top_k, -1, True, ordered)
    return best[0], best[1]


def _route(*arguments: object, **options: object) -> Pair:
    routed = xllm.moe_route.default(*arguments, **options)
    return routed[0], routed[1]


def route_softmax(logits: Tensor, top_k: int, ordered: bool) -> Pair:
    return _route(logits, None, top_k, "softmax")


def route_after(logits: Tensor, top_k: int, ordered: bool, dtype: torch.dtype) -> Pair:
    return _route(logits, None, top_k, "softmax_after_top_k")


def route_sigmoid(logits: Tensor, bias: Tensor, top_k: int, ordered: bool) -> Pair:
    return _route(logits, bias, top_k, "sigmoid")


def route_sigmoid_in_groups(
    logits: Tensor, bias: Tensor, top_k: int, top_groups: int, ordered: bool, groups: Ints,
    flat: Ints,
) -> Pair:
    return _route(logits, bias, top_k, "sigmoid", [groups[1], top_groups])


def route_softmax_in_groups(
    logits: Tensor, top_k: int, top_groups: int, ordered: bool, groups: Ints, flat: Ints,
) -> Pair:
    return _route(logits, None, top_k, "softmax", [groups[1], top_groups])


def _matrix(match: Match) -> bool:
    return match.val("logits").dim() == 2


def _biased(match: Match) -> bool:
    return _matrix(match) and match.val("bias").shape == match.val("logits").shape[1:]


def _grouped(match: Match) -> bool:
    experts, groups = match.val("logits").shape[1], match.binding["groups"]
    return (_matrix(match) and match.binding["flat"] == [-1, experts] and len(groups) == 3
            and groups[0] == -1 and groups[1] * groups[2] == experts)


def _biased_and_grouped(match: Match) -> bool:
    return _biased(match) and _grouped(match)


CHOICE = (
    Rewrite(softmax, route_softmax),
    Rewrite(softmax_float32, route_softmax),
    Rewrite(softmax_after_top_k, route_after),
    Rewrite(sigmoid, route_sigmoid, _biased),
    Rewrite(sigmoid_in_groups, route_sigmoid_in_groups, _biased_and_grouped),
    Rewrite(softmax_in_groups, route_softmax_in_groups, _grouped),
)


def normalised(logits: Tensor, bias: object, top_k: int, scoring: str, groups: Ints) -> Pair:
    weights, ids = _route(logits, bias, top_k, scoring, groups)
    return aten.div_.Tensor(weights, aten.sum.dim_IntList(weights, [-1], True)), ids


def normalised_with_eps(logits: Tensor, bias: object, top_k: int, scoring: str, groups: Ints,
                        eps: float) -> Pair:
    weights, ids = _route(logits, bias, top_k, scoring, groups)
    total = aten.add.Tensor(aten.sum.dim_IntList(weights, [-1], True), eps)
    return aten.div_.Tensor(weights, total), ids


def normalise(logits: Tensor, bias: object, top_k: int, scoring: str, groups: Ints) -> Pair:
    return _route(logits, bias, top_k, scoring, groups, True)


def normalise_with_eps(logits: Tensor, bias: object, top_k: int, scoring: str, groups: Ints,
                       eps: float) -> Pair:
    return _route(logits, bias, top_k, scoring, groups, True, eps)


def scaled(logits: Tensor, bias: object, top_k: int, scoring: str, groups: Ints, normalise: bool,
           eps: float, scale: float) -> Pair:
    weights, ids = _route(logits, bias, top_k, scoring, groups, normalise, eps)
    return aten.mul.Tensor(weights, scale), ids


def scale_weights(logits: Tensor, bias: object, top_k: int, scoring: str, groups: Ints,
                  normalise: bool, eps: float, scale: float) -> Pair:
    return _route(logits, bias, top_k, scoring, groups, normalise, eps, scale)


def cast(logits: Tensor, bias: object, top_k: int, scoring: str, groups: Ints, normalise: bool,
         eps: float, scale: float, dtype: torch.dtype) -> Pair:
    weights, ids = _route(logits, bias, top_k, scoring, groups, normalise, eps, scale)
    return aten.to.dtype(weights, dtype), ids


def cast_weights(logits: Tensor, bias: object, top_k: int, scoring: str, groups: Ints,
                 normalise: bool, eps: float, scale: float, dtype: torch.dtype) -> Pair:
    return _route(logits, bias, top_k, scoring, groups, normalise, eps, scale, dtype)


def _is_number(match: Match) -> bool:
    return isinstance(match.binding["scale"], float)


#: Tried in this order, each on all routers: as the op does it.
WEIGHTS = (
    Rewrite(normalised, normalise),
    Rewrite(normalised_with_eps, normalise_with_eps),
    Rewrite(scaled, scale_weights, _is_number),
    Rewrite(cast, cast_weights),
)
RULES = CHOICE + WEIGHTS


def _routed(node: fx.Node) -> bool:
    """Whether ids and weights of an ``xllm.experts`` node come straight from one router."""
    ids, weights = node.args[1:3]
    return (ids.target is weights.target is operator.getitem and ids.args[0] is weights.args[0]
            and ids.args[0].target is xllm.moe_route.default)


def recognise_moe_route(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Recognise ``xllm.moe_route``, the router of a mixture of experts."""
    apply(CHOICE, gm)
    for rule in WEIGHTS:
        apply((rule,), gm)
    return sum(map(_routed, calls_of(gm, xllm.experts.default)))


def expected(model: ModelFacts, ctx: PassContext) -> int | None:
    known = model.architecture in KNOWN or model.num_moe_layers == 0
    return model.num_moe_layers if known else None
