"""Answers from long documents: what to read, what the model says, and where it looked."""
