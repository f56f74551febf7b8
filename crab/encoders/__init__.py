"""Frozen visual and audio encoders behind one Protocol; `load.load_encoder` is the way in.

Nothing is imported here: a spec needs `config` alone, and torch and transformers take seconds to import.
"""
