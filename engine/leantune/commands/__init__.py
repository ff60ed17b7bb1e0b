"""The commands of `leantune`, one function each. What is slow to import is imported inside them."""
