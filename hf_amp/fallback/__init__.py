"""What to do about an overflow: find its cause, and plan which precision runs where."""
