"""The parts of a training run, which `surgery.train` puts together."""
