"""Everything that is read from files before a model runs: checkpoint, tokenizer, texts.

`skipkv.load` itself is the function that loads a model; what is in here is imported by its full name.
"""
