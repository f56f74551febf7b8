"""How many heads the adapter has, and how sharply its router chooses among them. Crab has 3 and 1."""

from optuna.distributions import FloatDistribution, IntDistribution

from tune_spaces.space import Parameter, Space

SPACE = Space(
    name="heads_and_temperature",
    about="Do more heads help, and should each token use one of them or a mixture?",
    parameters={
        # 1 is plain LoRA, which a sweep should be able to find best (the temperature then does nothing). Above 8 a head
        # gets an eighth of the tokens or less, and B's weights, which grow with the heads, are most of the adapter.
        "num_heads": Parameter(
            path="model.set.adapter.num_heads",
            distribution=IntDistribution(1, 8),
            meaning="B matrices of each adapted layer; 1 is plain LoRA",
        ),
        # A new router's logits differ by about 1. Ten times sharper is one head a token, whose router hardly learns any
        # more; ten times flatter is an even mixture. Logarithmic, as half as warm is as far from 1 as twice as warm.
        "router_temperature": Parameter(
            path="model.set.adapter.router_temperature",
            distribution=FloatDistribution(0.1, 10, log=True),
            meaning="divides the router's logits: small sharpens towards one head, large mixes evenly",
        ),
    },
    changes_shapes=frozenset({"num_heads"}),
)
