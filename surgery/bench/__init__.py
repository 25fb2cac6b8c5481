"""What methods cost and gain, side by side: measured in turns, in one process."""
