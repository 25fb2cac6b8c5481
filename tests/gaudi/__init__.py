"""Contract tests of the Gaudi backend: `make test-gaudi` runs them, in an environment of their own."""
