"""Text generation from a checkpoint, and the model behind it, which serving shares."""
