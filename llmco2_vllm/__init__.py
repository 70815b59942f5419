"""A carbon meter for LLM serving: a vLLM plugin. Importing this package has no side effect."""

__version__ = "0.1.0"
