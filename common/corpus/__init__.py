"""Public-domain texts that prompts are cut from when no documents are given (see README.md)."""
