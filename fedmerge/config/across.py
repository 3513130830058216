"""What keys of several sections have to do with each other: the checks that no section can make by itself.

Each takes a configuration whose sections are right by themselves, and returns what is wrong with it.
"""

from __future__ import annotations

from typing import NamedTuple

from fedmerge.config.config import Config
from fedmerge.config.locate import KeyPath
from fedmerge.errors import ConfigError
from fedmerge.screening.shares import SLACK

# Methods that take no parameters and average, unless the default protection stands in for "auto".
MEANS = ("auto", "fedavg")


class Problem(NamedTuple):
    """What is wrong with a key, and where the key is."""

    path: KeyPath
    text: str


def across_sections(config: Config) -> list[Problem]:
    """Return what in a configuration does not go together, but for [search], which `search_problems` checks."""
    return [problem for check in CHECKS for problem in check(config)]


def _rounds_problems(config: Config) -> list[Problem]:
    """Return what in [rounds] does not go together, or with a search."""
    rounds, problems = config.rounds, []
    if rounds.async_buffer is not None and rounds.async_buffer < rounds.min_nodes:
        text = f"should be min_nodes, {rounds.min_nodes}, at least"
        problems.append(Problem(("rounds", "async_buffer"), text))
    if rounds.dynamic_steps < 1:
        steps = config.train.extras.get("steps")
        if rounds.async_buffer is None or isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            text = "needs async_buffer, and steps in [train], of which it asks some nodes for fewer"
            problems.append(Problem(("rounds", "dynamic_steps"), text))
    if rounds.staleness_limit and config.search.strategy != "none":
        # A search has one factor for each node, and asks each for its scores.
        text = "does not go with late deltas ([rounds] late or async_buffer)"
        problems.append(Problem(("search", "strategy"), text))
    return problems


def _delta_problems(config: Config) -> list[Problem]:
    """Return what in [delta] does not go with the rest of the configuration."""
    delta, outer = config.delta, config.outer.name
    if delta.codec == "auto":
        text = 'is chosen by codec = "auto": leave it out, or leave codec out'
        chosen = {"error_feedback", *delta.codec_settings()} & delta.model_fields_set
        return [Problem(("delta", key), text) for key in sorted(chosen)]
    # The past would be carried on twice, at the nodes and at the coordinator: the sum was measured to diverge.
    if delta.error_feedback and outer != "sgd":
        text = f'does not go with [outer] name = "{outer}": residuals on top of momentum diverge; '
        return [Problem(("delta", "error_feedback"), f'{text}take "sgd", or leave it 0')]
    if delta.error_feedback and config.merge.steps:
        from fedmerge.merge.methods import IN_TIME

        for step in config.merge.steps:
            if step.method in IN_TIME:
                text = f"does not go with {step.method} over rounds, which carries the past on as momentum does; "
                return [Problem(("delta", "error_feedback"), f"{text}leave out that step, or leave it 0")]
    return []


def _scaffold_problems(config: Config) -> list[Problem]:
    """Refuse merges from whose step nodes can't tell the mean of their control variates."""
    if not config.train.extras.get("scaffold"):
        return []
    outer = config.outer
    if config.merge.method in MEANS and (outer.name, outer.lr) == ("sgd", 1.0) and not config.merge.steps:
        return []
    return [Problem(("train", "scaffold"), 'needs the plain mean: [merge] method = "fedavg", [outer] "sgd" with lr 1')]


def _screen_problems(config: Config) -> list[Problem]:
    """Refuse what in [screen] does not go together, or with the smallest round."""
    screen, problems = config.screen, []
    if screen.clip_quantile and screen.clip_norm_ratio is not None:
        problems.append(Problem(("screen", "clip_quantile"), "is another way to clip than clip_norm_ratio; set one"))
    least = config.rounds.min_nodes
    if screen.max_weight_node * least < 1 - SLACK:
        text = f"can't hold with {least} nodes (`rounds.min_nodes`): it should be {1 / least:.4g} at least"
        problems.append(Problem(("screen", "max_weight_node"), text))
    if config.search.strategy != "none":
        # A search puts factors on the weights, and what was capped would not be any more.
        caps = [key for key in ("max_weight_node", "max_weight_org") if getattr(screen, key) < 1]
        problems += [Problem(("screen", key), "does not go with a search, which sets weights itself") for key in caps]
    try:
        config.probe()
    except ConfigError as err:
        problems.append(Problem(("screen", "probe"), err.message.removeprefix("screen.probe").lstrip(": ")))
    if screen.root and "fltrust" not in screen.robust:
        problems.append(Problem(("screen", "root"), 'has no effect without the rule "fltrust" in robust'))
    return problems


def _robust_problems(config: Config) -> list[Problem]:
    """Refuse robust rules that could not hold in a round of the least allowed size, and what does not go with them."""
    if not (rules := config.robust_rules()):
        return []
    from fedmerge.merge.methods import NEEDS_FACTORS, NEEDS_STATISTICS
    from fedmerge.screening.robust import require_rules

    for what, methods in {"statistics": NEEDS_STATISTICS, "factors": NEEDS_FACTORS}.items():
        if config.merge.method in methods:
            text = f'do not go with [merge] method = "{config.merge.method}": combinations of deltas have no {what}'
            return [Problem(("screen", "robust"), text)]
    try:
        require_rules(rules, config.max_bad(), config.rounds.min_nodes, has_root=config.screen.root != "")
    except ConfigError as err:
        return [Problem(("screen", "robust"), err.message)]
    return []


def _streaming_problems(config: Config) -> list[Problem]:
    """Refuse what needs all of a model to travel in every round."""
    overlap = _overlap_problem(config)
    if config.streaming.fragments == 1 or overlap:
        return [Problem(("streaming", "overlap_steps"), overlap)] if overlap else []
    from fedmerge.merge.layers import varies
    from fedmerge.merge.methods import NEEDS_STATISTICS

    merge, extras = config.merge, config.train.extras
    adapted = [key for key in ("lora_rank", "fedprox_mu", "scaffold") if extras.get(key)]
    refused = {
        "late deltas ([rounds] late or async_buffer), which are of other parts": config.rounds.staleness_limit > 0,
        f"{' and '.join(adapted)} in [train], which go by whole models": bool(adapted),
        "[search], which scores whole models": config.search.strategy != "none",
        "[screen] probe, which scores whole models": config.screen.probe is not None,
        "[screen] clip_quantile, as parts have lengths of their own": config.screen.clip_quantile > 0,
        "[delta] error_feedback, whose residuals would be of other parts": config.delta.error_feedback > 0,
        '[delta] codec = "auto", which chooses for whole models': config.delta.codec == "auto",
        f'[merge] method = "{merge.method}", which needs statistics': merge.method in NEEDS_STATISTICS,
        "[merge] steps": bool(merge.steps),
        "[merge] values that vary over the model": any(varies(value) for value in merge.extras.values()),
    }
    found = [what for what, is_there in refused.items() if is_there]
    return [Problem(("streaming", "fragments"), f"above 1 does not go with {what}") for what in found]


def _overlap_problem(config: Config) -> str:
    """Say why rounds can't overlap as the file says, where they can't."""
    num_steps, overlap = config.train.extras.get("steps"), config.streaming.overlap_steps
    if not overlap:
        return ""
    from fedmerge.training import COUNTING

    if config.streaming.fragments == 1:
        return "goes with fragments above 1"
    if config.train.trainer not in COUNTING:
        return f'goes with the trainers {" and ".join(COUNTING)}, and not with "{config.train.trainer}"'
    if not isinstance(num_steps, int) or overlap >= num_steps:
        return "has to be less than [train] steps, which are to be given with it"
    return ""


def search_problems(config: Config) -> list[Problem]:
    """Check a search against the merge that it varies, which must be right itself."""
    if config.search.strategy == "none":
        return []
    if config.robust_rules():
        # They mix deltas so that no single node matters much; a factor for each node is the opposite.
        return [Problem(("search", "strategy"), "does not go with [screen] robust; set one of them")]
    try:
        config.search_settings()
    except ConfigError as err:
        return [Problem(("search",), err.message.removeprefix("search: "))]
    return []


CHECKS = (
    _rounds_problems,
    _delta_problems,
    _scaffold_problems,
    _screen_problems,
    _robust_problems,
    _streaming_problems,
)
