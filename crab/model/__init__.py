"""Crab's trainable parts around a frozen language model.

Read in this order: config (what can be set), tokens (names that the LLM does not know), prompt and
collate (samples to tensors), projector (features to LLM-wide vectors), crab_model (forward and
loss), generate (greedy text), artifact (save and load what is trained), llm (tokenizer and language
models), build (all of it from one config).
"""
