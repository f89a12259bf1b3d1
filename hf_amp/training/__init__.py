"""Training loops that are ours: three trainers of one step, and a manager of epochs over them."""
