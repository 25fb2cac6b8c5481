"""A page that a person reads: what a training run did, or what a bench found."""
