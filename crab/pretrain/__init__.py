"""Make the tiny preset: a Crab whose parts know AV-Shapes, so that an adapter learns its tasks on a laptop in minutes.

Scenes are rendered in memory; every label is exact. The stages, each from the results of those before it:

vision, audio    the encoders learn to name and place what is seen, and to name what is heard
language         the LLM learns the nine tasks from symbols: what perfect projectors would tell it (symbols.py)
features         frames and seconds of some scenes, through both encoders
projectors       features become what the symbols were
joint            the mask decoder learns to draw what the mask tokens ask for, then everything learns together

fit.py is the loop of steps that they share; packing.py puts several questions about a scene into one row.
"""
