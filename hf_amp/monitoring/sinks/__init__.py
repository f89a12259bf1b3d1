"""Where events go. Each sink imports its library by itself."""
