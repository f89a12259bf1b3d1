"""`hf-amp report`: what a run's log tells, as one page to show to people."""
