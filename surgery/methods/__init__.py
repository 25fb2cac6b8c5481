"""The methods of surgery, one module each."""
