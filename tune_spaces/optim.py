"""How the optimizer goes. Crab has a learning rate of 1e-4, 3 % warmup, no weight decay.

The batch size is no part of it. Trials are compared at the same step, where a larger batch has seen more samples and
has cost more: a sweep would call it better for that alone.
"""

from optuna.distributions import FloatDistribution

from tune_spaces.space import Parameter, Space

SPACE = Space(
    name="optim",
    about="How fast can the adapter learn before it becomes unstable?",
    parameters={
        # A tenth of Crab's, below which a short trial learns next to nothing, to three times the tiny preset's 1e-3.
        "learning_rate": Parameter(
            path="optimisation.learning_rate",
            distribution=FloatDistribution(1e-5, 3e-3, log=True),
            meaning="the highest learning rate, at the end of the warmup",
        ),
        # From none. What is warmed up for longer than a fifth of a trial is a lower learning rate by another name.
        "warmup_ratio": Parameter(
            path="optimisation.warmup_ratio",
            distribution=FloatDistribution(0, 0.2),
            meaning="share of the steps in which the learning rate rises",
        ),
        # From none, so not logarithmic. A step takes learning rate x decay of a weight: 1e-3 x 0.1 takes a quarter of
        # it in three thousand steps, and more would undo what is learnt.
        "weight_decay": Parameter(
            path="optimisation.weight_decay",
            distribution=FloatDistribution(0, 0.1),
            meaning="AdamW's decay of all trained matrices",
        ),
    },
)
