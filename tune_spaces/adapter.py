"""The size of the adapter, how strongly it acts, and where. Crab has rank 8, alpha 16, dropout 0.05, on all linears."""

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from tune_spaces.space import Parameter, Space

# By the names of Llama's layers, which Qwen2 and Mistral have as well.
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]

SPACE = Space(
    name="adapter",
    about="How large must the adapter be, how strong, and on which layers?",
    parameters={
        # Crab's 8 is the logarithmic middle. A whole number and no choice among 2, 4, 8 ..: a sampler that knows the
        # order learns from rank 4 something about rank 5.
        "r": Parameter(
            path="model.set.adapter.r",
            distribution=IntDistribution(2, 32, log=True),
            meaning="rank: rows of the shared A, columns of each B",
        ),
        # Crab's 16 is the middle again. The update is scaled by alpha / r, so alpha is varied beside r: with alpha left
        # alone, a sweep over r would be one over step sizes.
        "lora_alpha": Parameter(
            path="model.set.adapter.lora_alpha",
            distribution=FloatDistribution(4, 64, log=True),
            meaning="the adapter's update is scaled by lora_alpha / r",
        ),
        # From none, which is the tiny preset's. More than 0.2 is for many epochs over few samples.
        "lora_dropout": Parameter(
            path="model.set.adapter.lora_dropout",
            distribution=FloatDistribution(0, 0.2),
            meaning="share of the adapter's input that is dropped in training",
        ),
        # Attention decides what a token looks at, the feed-forward layers what is made of it.
        "targets": Parameter(
            path="model.set.adapter.target_modules",
            distribution=CategoricalDistribution(["attention", "feed_forward", "all"]),
            meaning="which linear layers of the language model are adapted",
            values={
                "attention": ATTENTION,
                "feed_forward": FEED_FORWARD,
                "all": ATTENTION + FEED_FORWARD,
            },
        ),
    },
    changes_shapes=frozenset({"r", "targets"}),
)
