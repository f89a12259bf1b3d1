"""What reads a run's log afterwards: the reader, the verdict, the page."""
