"""Draw the figures and tables of the paper from the results of ``ttt eval``, ``ttt inspect`` and ``ttt probe``."""
