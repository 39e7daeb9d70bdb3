"""Prompts: the record, the embedded tasks, and the mixture that deals them out."""
