"""A tokenizer of optimum-habana names this module when it is imported, and nothing here calls it."""
