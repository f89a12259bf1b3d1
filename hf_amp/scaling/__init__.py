"""Loss scaling: policies that choose the scale, and the scaler that applies it."""
