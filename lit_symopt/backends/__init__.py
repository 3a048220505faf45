"""Whose code computes a step: the option `backend` (`choice`), and what backends other than eager provide."""

from lit_symopt.backends.choice import BACKENDS, check_backend, check_scratch, chosen, require_backend, takes

__all__ = ["BACKENDS", "check_backend", "check_scratch", "chosen", "require_backend", "takes"]
