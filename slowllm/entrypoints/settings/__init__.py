"""Options from files: a user's own, presets of known models and machines, and recipes."""
