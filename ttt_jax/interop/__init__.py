"""Work with other people's code: checkpoints and reference numbers of the authors, and the evaluation harness."""
