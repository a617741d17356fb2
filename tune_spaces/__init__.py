"""Where to look: shipped recipes, axes and spaces. Pure."""
