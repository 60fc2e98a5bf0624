"""How do weights come by, and who passes through them? Knows no transformers and no text."""
