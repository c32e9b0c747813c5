"""When not to trust a prediction: rules that abstain, with a risk that is guaranteed for what they answer."""

from stfbnn.decision.abstention import AbstentionFigures, abstention_rule, evaluate_abstention
from stfbnn.decision.bounds import interval
from stfbnn.decision.rule import AbstentionRule

__all__ = ["AbstentionFigures", "AbstentionRule", "abstention_rule", "evaluate_abstention", "interval"]
