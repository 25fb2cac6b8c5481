"""Where training runs: one module for each kind of device."""
