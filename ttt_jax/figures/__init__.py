"""The pictures and tables of the paper, from what ``ttt eval`` and ``ttt inspect`` have written."""
