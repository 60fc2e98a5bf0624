"""OpenAI's formats: what a request may say, what it asks of a model, and how the answer is written. Knows no HTTP."""
