"""The stand-in for the vendor's bridge: README.md says what it is."""


def load() -> None:
    """What torch calls when it is imported (entry point `torch.backends`), as it does for the vendor's plugin."""
    import habana_frameworks.torch
