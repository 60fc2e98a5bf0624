"""How do several machines hold one model? What is said between them, and which way a token takes; no model is computed here."""
