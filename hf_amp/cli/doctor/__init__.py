"""`hf-amp doctor`: what this machine can run, and what it should."""
