"""What a trained model knows: loss by token index, and pictures of it."""
