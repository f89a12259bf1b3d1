"""What is known about a run: the metric catalogue, the monitor that fills it, and the sinks for events."""
