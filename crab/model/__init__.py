"""Crab's trainable parts around a frozen language model.

Read in this order: config (what can be set), tokens (names that the LLM does not know), prompt, example, drawing and
collate (samples to tensors), projector (features to LLM-wide vectors), mask_decoder and mask_loss (mask tokens to
masks), crab_model (forward and loss), generate (greedy text), artifact and initial (save and load what is trained), llm
(tokenizer and language models), build (all of it from one config).
"""
