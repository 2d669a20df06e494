"""What every outer loop shares."""
